"""Chooses the value of a setting on stated seeds, and lists the runs that are due. It imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from unmask.lab.study.cells import Cell
from unmask.lab.study.spec import Choice, Protocol
from unmask.lab.study.store import Result

Group = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Chosen:
    """The chosen value of a group of cells, which differ in the swept setting and the seed alone.

    Attributes:
        value: The value as it stands in the grid; None if every run failed, or none has ended.
        edge: ``"low"`` or ``"high"`` if the value is the least or the greatest of the grid, so that the best may lie
            outside; ``"alone"`` if the grid has one value; None otherwise.
        final: True if all runs that the choice depends on have ended.
        tried: Value, as text -> the mean figure that it is compared by. Only values with all their runs done are here.
    """

    value: Any
    edge: str | None
    final: bool
    tried: Mapping[str, float]


def choose(cells: Iterable[Cell], choice: Choice, results: Mapping[str, Result]) -> dict[Group, Chosen]:
    """Returns the chosen value of every group of the full grid."""
    groups: dict[Group, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group(choice.setting, "seed"), []).append(cell)
    return {key: _chosen(members, choice, results) for key, members in groups.items()}


def paired(cells: Iterable[Cell], setting: str) -> list[Cell]:
    """Returns the cells whose value of a setting has the same place in its grid as their seed has among the seeds.

    Where a group of cells has one value of the setting, all its seeds count.

    Example:
        >>> cells = [Cell(f"{lr}{seed}", {"lr": lr, "seed": seed}, {}) for seed in (6, 7) for lr in ("1e-4", "3e-4")]
        >>> [cell.id for cell in paired(cells, "lr")]
        ['1e-46', '3e-47']
    """
    cells = list(cells)
    places: dict[Group, tuple[list[str], list[str]]] = {}
    for cell in cells:
        values, seeds = places.setdefault(cell.group(setting, "seed"), ([], []))
        for known, label in ((values, setting), (seeds, "seed")):
            text = str(cell.labels.get(label))
            if text not in known:
                known.append(text)

    found = []
    for cell in cells:
        values, seeds = places[cell.group(setting, "seed")]
        value, seed = str(cell.labels.get(setting)), str(cell.labels.get("seed"))
        if len(values) == 1 or values.index(value) == seeds.index(seed):
            found.append(cell)
    return found


def due(cells: Sequence[Cell], protocol: Protocol, choice: Choice | None, results: Mapping[str, Result]) -> list[Cell]:
    """Returns the cells that the protocol needs and that can be run with what is known.

    Under ``"paper"`` with a paired setting these are the pairs. Otherwise they are all cells; with a choice, they are
    all cells of the choosing seeds, and the cells with the chosen value of the other seeds.
    """
    if protocol.pair and protocol.kind != "seeds":
        pairs = paired(cells, protocol.pair)
        if protocol.kind == "paper":
            return pairs
        wanted = {id(cell) for cell in (*pairs, *_due_by_choice(cells, choice, results))}
        return [cell for cell in cells if id(cell) in wanted]
    return _due_by_choice(cells, choice, results)


def _due_by_choice(cells: Sequence[Cell], choice: Choice | None, results: Mapping[str, Result]) -> list[Cell]:
    if choice is None:
        return list(cells)
    chosen, found = choose(cells, choice, results), []
    for cell in cells:
        best = chosen[cell.group(choice.setting, "seed")]
        if choosing(cell, choice) or (best.final and str(cell.labels.get(choice.setting)) == str(best.value)):
            found.append(cell)
    return found


def choosing(cell: Cell, choice: Choice) -> bool:
    """Returns True if the choice is made on this cell's seed."""
    return str(cell.labels.get("seed")) in set(map(str, choice.seeds))


def criterion(result: Result, by: str) -> float:
    """Returns the figure by which runs are compared; higher is better, and -inf means that there is no finite figure."""
    if result.get("status") != "done":
        return -math.inf
    value = result.get(by) if by in ("loss", "score") else (result.get("summary") or {}).get("after", {}).get(by)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return -math.inf
    return -float(value) if by == "loss" or by.endswith("_loss") else float(value)


def _chosen(members: Sequence[Cell], choice: Choice, results: Mapping[str, Result]) -> Chosen:
    """Returns the chosen value of one group."""
    values: list[Any] = list(
        {str(c.labels.get(choice.setting)): c.labels.get(choice.setting) for c in members}.values()
    )
    if len(values) == 1:
        return Chosen(values[0], "alone", True, {})
    figures: dict[str, float] = {}
    for value in map(str, values):
        runs = [c.id for c in members if choosing(c, choice) and str(c.labels.get(choice.setting)) == value]
        if runs and all(run in results for run in runs):
            figures[value] = fmean(criterion(results[run], choice.by) for run in runs)
    tried = {value: figure for value, figure in figures.items() if math.isfinite(figure)}
    final = len(figures) == len(values)
    if not tried:
        return Chosen(None, None, final, {})
    highest = max(tried, key=lambda value: tried[value])
    best = next(value for value in values if str(value) == highest)
    try:
        numbers = [float(value) for value in values]
        edge = {max(numbers): "high", min(numbers): "low"}.get(float(best))
    except (TypeError, ValueError):  # A setting that is no number has no edge.
        edge = None
    sign = -1 if choice.by.endswith("loss") else 1
    return Chosen(best, edge, final, {value: sign * figure for value, figure in tried.items()})
