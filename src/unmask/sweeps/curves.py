"""From the files of a run of ``unmask train`` to its score and its curve. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A run's final score, metric and loss, from its summary; None for what is not finite.

    Example:
        >>> scores({"main_metric": "mse", "main": 2.0, "greater_is_better": False, "after": {"loss": 2.0}})
        {'score': -2.0, 'metric': '-mse', 'loss': 2.0}
    """
    better = summary["greater_is_better"]
    losses = [value for key, value in summary["after"].items() if key == "loss" or key.endswith("_loss")]
    score = summary["main"] if better else -summary["main"]
    metric = summary["main_metric"] if better else f"-{summary['main_metric']}"
    return {"score": _finite(score), "metric": metric, "loss": _finite(losses[0]) if losses else None}


def curve(rows: list[dict[str, Any]], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Score and loss against step and unmasked weights, from the rows of ``metrics.jsonl``.

    Several splits are logged one after the other at a step: their rows are put together.
    """
    key, sign = f"eval_{summary['main_metric']}", 1 if summary["greater_is_better"] else -1
    points: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row.get(key) is not None:
            points.setdefault(row["step"], {"step": row["step"], "used": row["used"]})["score"] = sign * row[key]
        losses = [
            row[name] for name in row if name == "eval_loss" or (name.startswith("eval_") and name.endswith("_loss"))
        ]
        if losses and row["step"] in points:
            points[row["step"]].setdefault("loss", losses[0])
    return [point for _, point in sorted(points.items()) if all(map(math.isfinite, point.values()))]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
