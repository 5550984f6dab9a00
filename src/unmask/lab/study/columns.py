"""The columns that a task has in a table: one, but two for MNLI and one for each set of word problems. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from unmask.lab.study.cells import Cell
from unmask.lab.study.spec import Protocol
from unmask.lab.study.store import Result

_MNLI = {"mnli-m": "dev_matched_accuracy", "mnli-mm": "dev_mismatched_accuracy"}


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        label: Its heading; the task's name, or one that the task's columns have of their own.
        task: The task that it belongs to.
        metric: The metric after training that it shows; None for the run's score.
    """

    label: str
    task: str
    metric: str | None = None

    def value(self, result: Result) -> float | None:
        """The figure that a run has in this column; None for a run that failed, or that has no such finite figure."""
        after = (result.get("summary") or {}).get("after", {})
        value = result.get("score") if self.metric is None else after.get(self.metric)
        known = result["status"] == "done" and isinstance(value, int | float) and math.isfinite(value)
        return float(value) if known else None  # type: ignore[arg-type]


def task_of(cell: Cell) -> str:
    """The name of a cell's task; ``"data"`` for the user's own files."""
    return str(cell.settings.get("task") or "data")


def columns_of(cells: Iterable[Cell], results: Mapping[str, Result], protocol: Protocol) -> list[Column]:
    """The columns of the table of some cells, tasks in the cells' order.

    MNLI has one for each of its two validation sets, as in the paper (one, where the data has another set), a run that solves
    several sets of word problems one for each set, and every other task one.

    Args:
        cells: Cells of a sweep.
        results: Results of runs, by id.
        protocol: The sweep's protocol; where it names a metric, every task has a column of that metric.

    Example:
        >>> cells = [Cell("1", {}, {"task": "mnli"}), Cell("2", {}, {"task": "rte"})]
        >>> [column.label for column in columns_of(cells, {}, Protocol())]
        ['mnli-m', 'mnli-mm', 'rte']
    """
    tasks: dict[str, list[Cell]] = {}
    for cell in cells:
        tasks.setdefault(task_of(cell), []).append(cell)
    return [column for task, members in tasks.items() for column in _of_task(task, members, results, protocol)]


def _of_task(task: str, cells: Sequence[Cell], results: Mapping[str, Result], protocol: Protocol) -> list[Column]:
    if protocol.score != "score":
        return [Column(task, task, protocol.score)]
    sets = list(dict.fromkeys(name for cell in cells for name in cell.settings.get("test_sets", ())))
    if len(sets) > 1:
        return [Column(name, task, f"{name}_accuracy") for name in sets]
    done = [results[cell.id] for cell in cells if cell.id in results and results[cell.id]["status"] == "done"]
    after = [(result.get("summary") or {}).get("after", {}) for result in done]
    if task == "mnli" and all(metric in found for found in after for metric in _MNLI.values()):
        return [Column(label, task, metric) for label, metric in _MNLI.items()]
    return [Column(task, task)]
