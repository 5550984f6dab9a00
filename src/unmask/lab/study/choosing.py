"""Chooses the value of a setting on stated seeds, and lists the runs that are due. It imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from unmask.lab.study.cells import Cell, Group, places
from unmask.lab.study.spec import Choice, Protocol
from unmask.lab.study.store import Results, figure_of


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


Choices = dict[Group, Chosen]


def choose(cells: Iterable[Cell], choice: Choice, results: Results) -> Choices:
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
    groups, found = places(cells, setting), []
    for cell in cells:
        values, seeds = groups[cell.group(setting, "seed")]
        if len(values) == 1 or values[cell.label(setting)] == seeds[cell.label("seed")]:
            found.append(cell)
    return found


def due(cells: Sequence[Cell], protocol: Protocol, choice: Choice | None, results: Results) -> list[Cell]:
    """Returns the cells that the protocol needs and that can be run with what is known.

    Under ``"paper"`` with a paired setting these are the pairs. Otherwise they are all cells; with a choice, they are
    all cells of the choosing seeds, and the cells with the chosen value of the other seeds.
    """
    pairs = paired(cells, protocol.paired) if protocol.paired else []
    if pairs and protocol.kind == "paper":
        return pairs
    if choice is None:
        return list(cells)
    chosen, found, wanted = choose(cells, choice, results), [], set(map(id, pairs))
    for cell in cells:
        best = chosen[cell.group(choice.setting, "seed")]
        at_best = best.final and cell.label(choice.setting) == str(best.value)
        if id(cell) in wanted or choosing(cell, choice) or at_best:
            found.append(cell)
    return found


def choosing(cell: Cell, choice: Choice) -> bool:
    """Returns True if the choice is made on this cell's seed."""
    return cell.label("seed") in map(str, choice.seeds)


def _chosen(members: Sequence[Cell], choice: Choice, results: Results) -> Chosen:
    """Returns the chosen value of one group."""
    values: dict[str, Any] = {cell.label(choice.setting): cell.labels.get(choice.setting) for cell in members}
    if len(values) == 1:
        return Chosen(next(iter(values.values())), "alone", True, {})
    figures: dict[str, float] = {}
    for value in values:
        runs = [cell.id for cell in members if choosing(cell, choice) and cell.label(choice.setting) == value]
        if runs and all(run in results for run in runs):
            found = [figure_of(results[run], choice.by) for run in runs]
            figures[value] = fmean(math.nan if figure is None else figure for figure in found)
    tried = {value: figure for value, figure in figures.items() if math.isfinite(figure)}
    final = len(figures) == len(values)
    if not tried:
        return Chosen(None, None, final, {})
    sign = -1 if choice.by == "loss" or choice.by.endswith("_loss") else 1
    best = max(tried, key=lambda value: sign * tried[value])
    try:
        numbers = [float(value) for value in values.values()]
        edge = {max(numbers): "high", min(numbers): "low"}.get(float(values[best]))
    except (TypeError, ValueError):  # A setting that is no number has no edge.
        edge = None
    return Chosen(values[best], edge, final, tried)
