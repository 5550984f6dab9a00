"""Reads the files of a run of ``unmask train``: its score, its curve, its allocation. It imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.reading import (
    Form,
    Malformed,
    count,
    fields,
    finite,
    flag,
    items,
    mapping,
    number,
    optional,
    parse_json,
    plain,
    read_json,
    read_text,
    refusing,
    text,
)

_METHOD = {"name": text, "strategy": text, "parameters": mapping(plain), "leaving": text}
_COUNTS = ("budget", "used", "dense", "head", "parameters", "steps")
SUMMARY: Form = fields(
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
"""The form of a run's summary, in ``summary.json`` and in a sweep's result. Every entry may be missing."""
_OWN = fields(dict.fromkeys(("main_metric", "main", "greater_is_better", "after"), plain))
_ROW = fields({"layer": text, "kind": text, "unmasked": count, "of": count})
_SHARES = dict.fromkeys(("tensor_sparsity", "sparsity_entropy"), number)
SNAPSHOT: Form = fields(
    {"used": count, **_SHARES, "tensors": count, "rows": items(_ROW)},
    {"step": count, "sparsity_entropy_share": number, "picked": items(_ROW)},
)
"""The form of a line of ``allocation.jsonl``."""


def read_summary(path: Path) -> dict[str, Any] | None:
    """Returns the content of a finished run's ``summary.json``; None if another program wrote the file.

    Raises:
        DataError: The file cannot be read, or it is damaged.
    """
    with refusing(DataError, repr(str(path)), "Remove that run, or finish it."):
        summary = fields({})(read_json(path), "the summary")
        if "main_metric" not in summary:
            return None
        return dict(_OWN(consistent(summary, "the summary"), "the summary"))


def consistent(value: Any, where: str) -> dict[str, Any]:
    """Checks a summary's form, and that its entries fit each other."""
    summary = dict(SUMMARY(value, where))
    if (summary.get("method") or {}).get("leaving") == "kept" and summary.get("used") is None:
        raise Malformed(f"{where} lacks used, which a method that keeps what leaves has")
    return summary


def scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's final score, metric and loss from its summary; a figure that is not finite becomes None.

    Example:
        >>> scores({"main_metric": "mse", "main": 2.0, "greater_is_better": False, "after": {"loss": 2.0}})
        {'score': -2.0, 'metric': '-mse', 'loss': 2.0}
    """
    better = summary["greater_is_better"]
    losses = [value for key, value in summary["after"].items() if key == "loss" or key.endswith("_loss")]
    score, loss = summary["main"] if better else -summary["main"], losses[0] if losses else math.nan
    return {
        "score": score if math.isfinite(score) else None,
        "metric": summary["main_metric"] if better else f"-{summary['main_metric']}",
        "loss": loss if math.isfinite(loss) else None,
    }


def curve(rows: list[dict[str, Any]], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the points of a run's curve: step, unmasked weights, score and loss, from the rows of ``metrics.jsonl``.

    Several splits are logged one after the other at one step; their rows become one point.
    """
    key, sign = f"eval_{summary['main_metric']}", 1 if summary["greater_is_better"] else -1
    points: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row.get(key) is not None:
            points.setdefault(row["step"], {"step": row["step"], "used": row["used"]})["score"] = sign * row[key]
        losses = [
            row[name] for name in row if name == "eval_loss" or (name.startswith("eval_") and name.endswith("_loss"))
        ]
        if losses and losses[0] is not None and row["step"] in points:
            points[row["step"]].setdefault("loss", losses[0])
    return [point for _, point in sorted(points.items()) if all(map(math.isfinite, point.values()))]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of ``metrics.jsonl``; there are none if there is no such file.

    Raises:
        DataError: A line is damaged.
    """

    def form(value: Any, where: str) -> dict[str, Any]:
        row = dict(fields({"step": count, "used": count})(value, where))
        for name, figure in row.items():
            if name.startswith("eval_"):
                optional(number)(figure, f"{where}.{name}")
        return row

    return _read_rows(path, form)


def read_allocation(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of ``allocation.jsonl``; there are none if there is no such file.

    Raises:
        DataError: A line is damaged.
    """
    return _read_rows(path, SNAPSHOT)


def _read_rows(path: Path, form: Form) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with refusing(DataError, repr(str(path)), "Remove the line, or run that run again."):
        lines = read_text(path).splitlines()
        return [form(parse_json(line), f"line {place}") for place, line in enumerate(lines, 1)]
