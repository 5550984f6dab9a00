"""The forms of the JSON values in a run's files and in a sweep's folder. It imports no torch."""

from __future__ import annotations

from typing import Any

from unmask.reading import (
    Malformed,
    count,
    fields,
    finite,
    flag,
    items,
    mapping,
    number,
    one_of,
    optional,
    plain,
    scalar,
    text,
)

_METHOD = {"name": text, "strategy": text, "parameters": mapping(plain), "leaving": text}
_COUNTS = ("budget", "used", "dense", "head", "parameters", "steps")
_SUMMARY = fields(
    {},
    {
        "task": optional(text),
        "method": optional(fields({}, _METHOD)),
        **dict.fromkeys(_COUNTS, optional(count)),
        **dict.fromkeys(("main", "lr"), optional(number)),
        "seconds": optional(finite),
        "main_metric": text,
        "greater_is_better": flag,
        "before": mapping(number),
        "after": mapping(number),
        "into": optional(mapping(plain)),
    },
)


def summary_form(value: Any, where: str) -> dict[str, Any]:
    """Accepts a run's summary, of ``summary.json`` or of a sweep's result. Every entry may be missing.

    Only a method that keeps what leaves the selection must have the entry ``used``.
    """
    found = dict(_SUMMARY(value, where))
    if (found.get("method") or {}).get("leaving") == "kept" and found.get("used") is None:
        raise Malformed(f"{where} lacks used, which a method that keeps what leaves has")
    return found


def metrics_form(value: Any, where: str) -> dict[str, Any]:
    """Accepts a line of ``metrics.jsonl``."""
    row = dict(fields({"step": count, "used": count})(value, where))
    for name, figure in row.items():
        if name.startswith("eval_"):
            optional(number)(figure, f"{where}.{name}")
    return row


_ROW = fields({"layer": text, "kind": text, "unmasked": count, "of": count})
_SHARES = dict.fromkeys(("tensor_sparsity", "sparsity_entropy"), number)
SNAPSHOT = fields(
    {"used": count, **_SHARES, "tensors": count, "rows": items(_ROW)},
    {"step": count, "sparsity_entropy_share": number, "picked": items(_ROW)},
)
"""The form of a line of ``allocation.jsonl``."""


def _setting(value: Any, where: str) -> Any:
    """Accepts a text, a number, true, false, null, or a list of these."""
    return items(scalar)(value, where) if isinstance(value, list | tuple) else scalar(value, where)


def _rate(value: Any, where: str) -> Any:
    return value if value == "auto" else finite(value, where)


_LABELS = mapping(_setting)
_KNOWN = fields({}, {"seed": count, "lr": _rate, "eps": finite, "exp": finite, "test_sets": items(text)})


def _settings(value: Any, where: str) -> dict[str, Any]:
    return dict(_KNOWN(_LABELS(value, where), where))


STATES = ("done", "failed")
_POINT = fields({"step": count, "used": count, "score": finite}, {"loss": finite})
RESULT = fields(
    {"status": one_of(*STATES), "labels": _LABELS, "settings": _settings},
    {
        "id": text,
        **dict.fromkeys(("score", "loss"), optional(number)),
        "seconds": optional(finite),
        **dict.fromkeys(("metric", "started", "host"), text),
        "resumed_at": optional(count),
        "summary": optional(summary_form),
        "curve": optional(items(_POINT)),
        "allocation": optional(items(SNAPSHOT)),
        "series": items(fields({"step": count, "used": count, "score": optional(number), "file": text})),
        "versions": optional(mapping(scalar)),
        "error": optional(mapping(plain)),
    },
)
"""The form of a run's result."""
PLAN = fields(
    {
        **dict.fromkeys(("name", "title", "command"), text),
        **dict.fromkeys(("notes", "figures"), items(text)),
        "claims": optional(mapping(plain)),
        "choose": optional(mapping(plain)),
        "protocol": mapping(plain),
        "cells": items(fields({"id": text, "labels": _LABELS, "settings": _settings})),
    }
)
"""The form of ``sweep.json``."""
