"""From a sweep's results to the records that figures are drawn from. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, cast

from unmask.figures.records import RunRecord
from unmask.sweeps.cells import Cell
from unmask.sweeps.store import Result


def record(cell: Cell, result: Result) -> RunRecord | None:
    """A finished run's record; None for a run that failed or has no finite score."""
    if result.get("status") != "done" or result.get("score") is None:
        return None
    summary, settings = result.get("summary") or {}, result["settings"]
    method = summary.get("method") or {}
    found: dict[str, Any] = {
        "name": cell.id,
        "method": str(cell.labels.get("method", "id3")),
        "task": str(settings.get("task") or summary.get("task") or "data"),
        "model": PurePath(str(settings.get("model", ""))).name,
        "budget": trained_weights(summary),
        "share": trained_weights(summary) / base_weights(summary),
        "seed": int(settings.get("seed", 0)),
        "lr": float(summary.get("lr") or settings.get("lr", 1e-3)),
        "score": result["score"],
        "loss": result.get("loss"),
        "metric": str(result.get("metric", "score")),
        "strategy": "none" if settings.get("method") == "full" else str(method.get("strategy", "none")),
        "parameters": {**method.get("parameters", {}), **parameters(settings)},
        "curve": result.get("curve"),
        "allocation": result.get("allocation"),
    }
    return cast(RunRecord, {key: value for key, value in found.items() if value not in (None, [])})


def records(cells: Iterable[Cell], results: Mapping[str, Result]) -> list[RunRecord]:
    """Records of all runs that are done, one for each run."""
    found: dict[str, RunRecord] = {}
    for cell in cells:
        made = record(cell, results[cell.id]) if cell.id in results else None
        if made is not None:
            found.setdefault(cell.id, made)
    return list(found.values())


def trained_weights(summary: Mapping[str, Any]) -> int:
    """The weights that count: the budget; of full fine-tuning and of a whole LoRA all that is trained but the new head.

    Example:
        >>> trained_weights({"budget": 290, "head": 34, "method": {"name": "full"}})
        256
    """
    whole = (summary.get("method") or {}).get("name") == "full"
    return int(summary.get("budget") or 0) - (int(summary.get("head") or 0) if whole else 0)


def base_weights(summary: Mapping[str, Any]) -> int:
    """Weights of the model, without those of a LoRA that is trained whole."""
    total = int(summary.get("parameters") or 0)
    whole = bool(summary.get("into")) and (summary.get("method") or {}).get("name") == "full"
    return max(1, total - int(summary.get("budget") or 0) if whole else total)


def parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's method was told other than its budget, by the settings' names.

    Example:
        >>> parameters({"method": "id3", "stride": 10, "lr": 0.1})
        {'stride': 10, 'schedule': 'uniform', 'eps': 1.0, 'exp': 2.0}
    """
    names = (
        "stride",
        "schedule",
        "allocation",
        "scope",
        "bias_correction",
        "heuristic",
        "lora_r",
        "lora_targets",
        "into",
    )
    found = {name: settings[name] for name in names if name in settings}
    if settings.get("method", "id3") == "id3":
        found.setdefault("schedule", "uniform")
    if settings.get("method", "id3") in ("id3", "repeat_d3", "static_d3") and settings.get("heuristic") in (None, "d3"):
        found |= {"eps": settings.get("eps", 1.0), "exp": settings.get("exp", 2.0)}
    return found
