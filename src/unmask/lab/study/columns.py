"""The columns of a task in a table: one, two for MNLI, or one for each set of word problems. It imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from unmask.lab.study.cells import Cell
from unmask.lab.study.spec import Protocol
from unmask.lab.study.store import Result, Results, after_training, figure_of

_MNLI = {"mnli-m": "dev_matched_accuracy", "mnli-mm": "dev_mismatched_accuracy"}


@dataclass(frozen=True)
class Column:
    """The heading of a column, and the figure that it shows.

    Attributes:
        label: The column's heading: the task's name, or the name of one of the task's evaluation sets.
        task: The task that the column belongs to.
        metric: The metric after training that the column shows; None for the run's score.
    """

    label: str
    task: str
    metric: str | None = None

    def value(self, result: Result) -> float | None:
        """Returns a run's figure in this column; None for a run that failed or has no finite figure."""
        return figure_of(result, self.metric or "score")


def task_of(cell: Cell) -> str:
    """Returns the name of a cell's task; ``"data"`` for the user's own files."""
    return str(cell.settings.get("task") or "data")


def columns_of(cells: Iterable[Cell], results: Results, protocol: Protocol) -> list[Column]:
    """Returns the columns of a table; the tasks stand in the cells' order.

    MNLI has a column for each of its two validation sets, as in the paper, and one column if the data has another set.
    Runs that solve several sets of word problems have a column for each set. Every other task has one column, and if
    the protocol names a metric, every task has one, which shows that metric.

    Example:
        >>> cells = [Cell("1", {}, {"task": "mnli"}), Cell("2", {}, {"task": "rte"})]
        >>> [column.label for column in columns_of(cells, {}, Protocol())]
        ['mnli-m', 'mnli-mm', 'rte']
    """
    tasks: dict[str, list[Cell]] = {}
    for cell in cells:
        tasks.setdefault(task_of(cell), []).append(cell)
    columns: list[Column] = []
    for task, members in tasks.items():
        sets = list(dict.fromkeys(name for cell in members for name in cell.settings.get("test_sets", ())))
        ended = [results[cell.id] for cell in members if cell.id in results]
        after = [after_training(result) for result in ended if result["status"] == "done"]
        if protocol.score != "score":
            columns.append(Column(task, task, protocol.score))
        elif len(sets) > 1:
            columns += [Column(name, task, f"{name}_accuracy") for name in sets]
        elif task == "mnli" and all(metric in found for found in after for metric in _MNLI.values()):
            columns += [Column(label, task, metric) for label, metric in _MNLI.items()]
        else:
            columns.append(Column(task, task))
    return columns
