"""Reads the files of a run of ``unmask train``: its scores, its curve, its allocation. It imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.lab.study.forms import SNAPSHOT, metrics_form, summary_form
from unmask.reading import Form, fields, parse_json, plain, read_json, read_text, refusing

_OWN = fields(dict.fromkeys(("main_metric", "main", "greater_is_better", "after"), plain))


def read_run(folder: Path) -> dict[str, Any] | None:
    """Returns the entries of a result that a finished run's files hold: scores, summary, curve and allocation.

    It returns None if another program wrote ``summary.json``.

    Raises:
        DataError: A file cannot be read, or it is damaged.
    """
    summary = read_summary(folder / "summary.json")
    if summary is None:
        return None
    return {
        **scores(summary),
        "summary": summary,
        "curve": curve(_read_rows(folder / "metrics.jsonl", metrics_form), summary),
        "allocation": _read_rows(folder / "allocation.jsonl", SNAPSHOT),
    }


def read_summary(path: Path) -> dict[str, Any] | None:
    """Returns the content of a finished run's ``summary.json``; None if another program wrote the file.

    Raises:
        DataError: The file cannot be read, or it is damaged.
    """
    with refusing(DataError, repr(str(path)), "Remove that run, or finish it."):
        summary = fields({})(read_json(path), "the summary")
        if "main_metric" not in summary:
            return None
        return dict(_OWN(summary_form(summary, "the summary"), "the summary"))


def scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's final score, metric and loss from its summary; a figure that is not finite becomes None.

    Example:
        >>> scores({"main_metric": "mse", "main": 2.0, "greater_is_better": False, "after": {"loss": 2.0}})
        {'score': -2.0, 'metric': '-mse', 'loss': 2.0}
    """
    better = summary["greater_is_better"]
    score = summary["main"] if better else -summary["main"]
    loss = next((value for key, value in summary["after"].items() if key == "loss" or key.endswith("_loss")), math.nan)
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
        losses = [row[name] for name in row if name.startswith("eval_") and name.endswith("_loss")]
        if losses and losses[0] is not None and row["step"] in points:
            points[row["step"]].setdefault("loss", losses[0])
    return [point for _, point in sorted(points.items()) if all(map(math.isfinite, point.values()))]


def _read_rows(path: Path, form: Form) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines; there are none if there is no such file."""
    if not path.is_file():
        return []
    with refusing(DataError, repr(str(path)), "Remove the line, or run that run again."):
        lines = read_text(path).splitlines()
        return [form(parse_json(line), f"line {place}") for place, line in enumerate(lines, 1)]
