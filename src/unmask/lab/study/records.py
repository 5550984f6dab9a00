"""Turns a sweep's results into the records from which figures are drawn. It imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, cast

from unmask.lab.figures.records import RunRecord
from unmask.lab.study.cells import Cell
from unmask.lab.study.choosing import choose, paired
from unmask.lab.study.columns import columns_of, task_of
from unmask.lab.study.spec import Choice, Protocol
from unmask.lab.study.store import Results, figure_of

_PLACED = ("method", "task", "budget", "seed", "model", "eps", "exp", "lr")
"""The labels for which a record has an entry."""
_PARAMETERS = (
    "stride", "schedule", "allocation", "scope", "bias_correction", "heuristic", "lora_r", "lora_targets", "into",
)  # fmt: skip


def records(cells: Iterable[Cell], results: Results, protocol: Protocol, choice: Choice | None) -> list[RunRecord]:
    """Returns a record for each run that counts under a sweep's protocol and has a finite score.

    Under the paper's protocol with a paired setting these are the pairs, and the entry ``best`` of each record says
    how many of them count. Otherwise they are the runs at the chosen value of the swept setting. Labels for which a
    record has no entry become part of the method's name. ``cells`` are those of the full grid.
    """
    cells, swept = list(cells), protocol.paired or (choice.setting if choice else "lr")
    if protocol.paired:
        cells = paired(cells, protocol.paired)
    elif choice:
        chosen = choose(cells, choice, results)
        cells = [c for c in cells if c.label(swept) == str(chosen[c.group(swept, "seed")].value)]
    columns = columns_of(cells, results, protocol)
    found: dict[str, RunRecord] = {}
    for cell in [cell for cell in cells if cell.id in results]:
        result = results[cell.id]
        score = figure_of(result, "score")
        if score is None:
            continue
        summary, settings = result.get("summary") or {}, result["settings"]
        method, trained = summary.get("method") or {}, trained_weights(summary)
        whole, rate = settings.get("method") == "full", settings.get("lr", 1e-3)
        more = [f"{k} {v}" for k, v in cell.labels.items() if k not in (*_PLACED, swept) and v is not None]
        shown = {column.label: column.value(result) for column in columns if column.task == task_of(cell)}
        entries: dict[str, Any] = {
            "name": cell.id,
            "method": " ".join([str(cell.labels.get("method", "id3")), *more]),
            "task": str(settings.get("task") or summary.get("task") or "data"),
            "model": PurePath(str(settings.get("model", ""))).name,
            "budget": trained if whole else int(summary.get("budget") or 0),
            "trained": trained,
            "share": trained / base_weights(summary),
            "seed": int(settings.get("seed", 0)),
            "lr": float(summary.get("lr") or (0.0 if rate in ("auto", None) else rate)),
            "best": protocol.best if protocol.paired else None,
            "score": score,
            "columns": {label: value for label, value in shown.items() if value is not None},
            "loss": result.get("loss"),
            "metric": str(result.get("metric", "score")),
            "strategy": "none" if whole else str(method.get("strategy", "none")),
            "parameters": {**method.get("parameters", {}), **parameters(settings)},
            "curve": result.get("curve"),
            "allocation": result.get("allocation"),
        }
        record = {key: value for key, value in entries.items() if value not in (None, [])}
        found.setdefault(cell.id, cast(RunRecord, record))
    return list(found.values())


def trained_weights(summary: Mapping[str, Any]) -> int:
    """Returns the number of weights that a run trains, which is its budget for most methods.

    For full fine-tuning and a LoRA that is trained whole it is the number of all trained weights except the new head.
    For a repeat-S that keeps what leaves the selection, it is the number of all weights that were ever selected.

    Example:
        >>> trained_weights({"budget": 290, "head": 34, "method": {"name": "full"}})
        256
        >>> trained_weights({"budget": 100, "used": 1630, "method": {"name": "repeat_d3", "leaving": "kept"}})
        1630
    """
    method, budget = summary.get("method") or {}, int(summary.get("budget") or 0)
    if method.get("leaving") == "kept":
        return int(summary["used"])
    return budget - (int(summary.get("head") or 0) if method.get("name") == "full" else 0)


def base_weights(summary: Mapping[str, Any]) -> int:
    """Returns the number of the model's weights, without those of a LoRA that is trained whole."""
    total = int(summary.get("parameters") or 0)
    whole = bool(summary.get("into")) and (summary.get("method") or {}).get("name") == "full"
    return max(1, total - int(summary.get("budget") or 0) if whole else total)


def parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a run's method other than its budget, by the settings' names.

    Example:
        >>> parameters({"method": "id3", "stride": 10, "lr": 0.1})
        {'stride': 10, 'schedule': 'uniform', 'eps': 1.0, 'exp': 2.0}
    """
    found = {name: settings[name] for name in _PARAMETERS if name in settings}
    if settings.get("method", "id3") == "id3":
        found.setdefault("schedule", "uniform")
    if settings.get("method", "id3") in ("id3", "repeat_d3", "static_d3") and settings.get("heuristic") in (None, "d3"):
        found |= {"eps": settings.get("eps", 1.0), "exp": settings.get("exp", 2.0)}
    return found
