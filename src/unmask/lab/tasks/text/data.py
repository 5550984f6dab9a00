"""What a loaded task holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unmask.errors import DataError
from unmask.lab.tasks.labels import decode
from unmask.lab.tasks.tables import Table, placed
from unmask.lab.tasks.text.spec import TaskSpec

__all__ = ["Examples", "TaskData", "TaskSpec", "examples"]


@dataclass(frozen=True)
class Examples:
    """Texts with labels.

    Attributes:
        texts: First texts.
        pairs: Second texts, or None.
        labels: Class ids, or real numbers for regression.

    Raises:
        DataError: The lists are not of one length.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]

    def __post_init__(self) -> None:
        sizes = {len(self.texts), len(self.labels)} | ({len(self.pairs)} if self.pairs is not None else set())
        if len(sizes) > 1:
            raise DataError(f"texts, pairs and labels must be of one length; they are of {sorted(sizes)}.")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> Examples:
        """The examples of the given rows, in that order.

        Example:
            >>> Examples(["a", "b", "c"], None, [0, 1, 0]).take([2, 1])
            Examples(texts=['c', 'b'], pairs=None, labels=[0, 1])
        """
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        labels: Any = [self.labels[row] for row in rows]
        return Examples([self.texts[row] for row in rows], pairs, labels)

    def by_length(self) -> Examples:
        """Short ones first: batches of like lengths need little padding.

        Example:
            >>> Examples(["abc", "b", "cd"], ["", "", "efg"], [0, 1, 2]).by_length().labels
            [1, 0, 2]
        """
        lengths = [len(text) for text in self.texts]
        if self.pairs is not None:
            lengths = [first + len(second) for first, second in zip(lengths, self.pairs, strict=True)]
        return self.take(sorted(range(len(self)), key=lengths.__getitem__))


@dataclass(frozen=True)
class TaskData:
    """A loaded task.

    Attributes:
        spec: The task.
        train: Its training split.
        evals: Its evaluation splits by name, the main one first.
        notes: What the user should know of the loading: rows left out, rows held out, sizes that are not the official.
    """

    spec: TaskSpec
    train: Examples
    evals: Mapping[str, Examples]
    notes: tuple[str, ...] = field(default=())


def examples(spec: TaskSpec, table: Table, columns: Sequence[str], label: str, keep_empty: bool = False) -> Examples:
    """Builds examples from a table, and checks each.

    Args:
        spec: Says which labels there are.
        table: The rows.
        columns: The text columns, one or two.
        label: The label column.
        keep_empty: Let one text of a pair be empty.

    Raises:
        DataError: A missing column, an empty text, or a label outside the task's.

    Example:
        >>> spec = TaskSpec("t", ("text",), 2, ("bad", "good"), ("accuracy",), "accuracy")
        >>> examples(spec, Table("here", {"text": ["fine"], "y": ["good"]}, [1]), ["text"], "y").labels
        [1]
    """
    texts = [list(table.column(column)) for column in columns]
    labels: list[Any] = []
    for row, value in enumerate(table.column(label)):
        filled = [_is_text(table, row, column, cells[row]) for column, cells in zip(columns, texts, strict=True)]
        if not (any(filled) if keep_empty else all(filled)):
            column = columns[filled.index(False)]
            raise DataError(f"{table.where(row)}: the text in column {column!r} is empty; mend or drop the row.")
        with placed(f"{table.where(row)}, column {label!r}"):
            labels.append(decode(spec, value))
    kept = [[cell or "" for cell in cells] for cells in texts]  # None, where an empty text is let through
    return Examples(kept[0], kept[1] if len(kept) > 1 else None, labels)


def _is_text(table: Table, row: int, column: str, value: object) -> bool:
    """Whether a cell holds any text; a cell of another type is an error."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{table.where(row)}: column {column!r} holds {value!r:.60}, which is no text.")
    return bool(value and value.strip())
