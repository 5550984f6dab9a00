"""Turns the rows of a table into examples: labels become class ids or real numbers, or the task is inferred from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unmask.errors import DataError
from unmask.lab.tasks.tables import Table, listed, placed
from unmask.lab.tasks.text.spec import CUSTOM, Examples, TaskSpec, default_metrics
from unmask.reading import shown

# float() would also take "1_000", "nan" and "infinity"; none of these is a number in a data file.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MOST_SHOWN = 12


def examples(spec: TaskSpec, table: Table, columns: Sequence[str], label: str, keep_empty: bool = False) -> Examples:
    """Builds examples from a table with one or two text columns and a label column, and checks each.

    ``keep_empty`` accepts a pair of which one text is empty.

    Raises:
        DataError: A column is missing, a text is empty, or a label is none of the task's. The error names the first such row,
            and says how many there are.

    Example:
        >>> spec = TaskSpec("t", ("text",), 2, ("bad", "good"), ("accuracy",), "accuracy")
        >>> examples(spec, Table("here", {"text": ["fine"], "y": ["good"]}, [1]), ["text"], "y").labels
        [1]
    """
    texts = [list(table.column(column)) for column in columns]
    labels: list[Any] = []
    faults: list[DataError] = []
    for row, value in enumerate(table.column(label)):
        try:
            _check_texts(
                table, row, {column: cells[row] for column, cells in zip(columns, texts, strict=True)}, keep_empty
            )
            with placed(f"{table.where(row)}, column {label!r}"):
                labels.append(decode(spec, value))
        except DataError as error:
            faults.append(error)
    if faults:
        raise DataError(f"{faults[0]}{_and_more(len(faults) - 1)}")
    kept = [[cell or "" for cell in cells] for cells in texts]  # an empty text of a pair may be None
    return Examples(kept[0], kept[1] if len(kept) > 1 else None, labels)


def _check_texts(table: Table, row: int, texts: Mapping[str, Any], keep_empty: bool) -> None:
    """Refuses a row whose cells are no texts, or in which a text is empty."""
    for column, cell in texts.items():
        if not isinstance(cell, str | None):
            raise DataError(f"{table.where(row)}: column {column!r} holds {cell!r:.60}, which is not a text.")
    empty = [column for column, cell in texts.items() if not (cell and cell.strip())]
    if empty and (not keep_empty or len(empty) == len(texts)):
        raise DataError(f"{table.where(row)}: the text in column {empty[0]!r} is empty; mend or drop the row.")


def _and_more(count: int) -> str:
    return f" {count:,} more row{'s have' if count > 1 else ' has'} a fault too." if count else ""


def complete(table: Table, columns: Sequence[str], label: str, drop: bool) -> tuple[Table, str | None]:
    """Finds the rows that lack a text or the label.

    Returns:
        The table without these rows, and a note that counts them; the same table and None if there are none.

    Raises:
        DataError: A column is missing. Or there are such rows, and they are not to be dropped, or no others are left.

    Example:
        >>> table = Table("here", {"text": ["fine", None], "y": ["good", "bad"]}, [1, 2])
        >>> kept, note = complete(table, ["text"], "y", drop=True)
        >>> len(kept), note
        (1, 'here: 1 row without a text or a label is left out')
    """
    cells = {column: table.column(column) for column in (*columns, label)}
    lacking = {
        row: column
        for column, values in cells.items()
        for row, cell in enumerate(values)
        if (is_missing(cell) if column == label else cell is None or (isinstance(cell, str) and not cell.strip()))
    }
    if not lacking:
        return table, None
    first, count = min(lacking), len(lacking)
    kept = [row for row in range(len(table)) if row not in lacking]
    if not drop or not kept:
        column = lacking[first]
        what = "label is missing" if column == label else f"text in column {column!r} is empty"
        there = f" ({label!r} is {shown(cells[label][first])})" if column == label else ""
        raise DataError(
            f"{table.where(first)}: the {what}{there}; mend or drop the row. {count:,} of {len(table):,} rows lack a text or "
            "the label; --drop-missing (drop_missing=True) leaves such rows out."
        )
    note = f"{table.source}: {count:,} row{'s' * (count > 1)} without a text or a label {'are' if count > 1 else 'is'} left out"
    values = {column: [cell[row] for row in kept] for column, cell in table.columns.items()}
    return Table(table.source, values, [table.places[row] for row in kept], table.unit, table.skipped), note


def decode(spec: TaskSpec, value: Any) -> int | float:
    """Reads one label of a task: a class name, a class id or a real number, as text or as a number.

    Returns:
        A class id in 0 to num_labels - 1, or a real number for regression.

    Raises:
        DataError: The value is none of the task's labels.

    Example:
        >>> spec = TaskSpec("t", ("text",), 2, ("bad", "good"), ("accuracy",), "accuracy")
        >>> decode(spec, "good"), decode(spec, "0"), decode(spec, 1.0)
        (1, 0, 1)
    """
    if is_missing(value):
        raise DataError(f"the label is missing ({shown(value)}); mend or drop the row.")
    if isinstance(value, list | dict):
        raise DataError(f"label {shown(value)} is neither a text nor a number; mend or drop the row.")
    number = number_of(value)
    if spec.regression:
        if number is None:
            raise DataError(f"label {shown(value)} is not a finite number, and task {spec.name!r} is a regression.")
        low, high = spec.label_range or (-math.inf, math.inf)
        if not low <= number <= high:
            raise DataError(f"label {shown(value)} is outside the range of task {spec.name!r}: {low:g} to {high:g}.")
        return number
    name = str(value).strip()
    if spec.label_names is not None and name in spec.label_names:
        return spec.label_names.index(name)
    if isinstance(value, bool):
        number = float(value)
    if spec.takes_ids and number is not None and number in range(spec.num_labels):
        return int(number)
    ids = f"0 to {spec.num_labels - 1}" if spec.takes_ids else ""
    names = listed(spec.label_names, _MOST_SHOWN) if spec.label_names else ""
    allowed = " or ".join(part for part in (ids, names) if part)
    raise DataError(f"label {shown(value)} is not a label of task {spec.name!r}; allowed: {allowed}.")


def is_missing(value: Any) -> bool:
    """Returns True if a cell is None, NaN or blank.

    Example:
        >>> [is_missing(value) for value in (None, float("nan"), " ", "NaN", 0, "none")]
        [True, True, True, True, False, False]
    """
    return value is None or str(value).strip().lower() in ("", "nan", "<na>", "nat")


def number_of(value: Any) -> float | None:
    """Reads a cell as a finite number; any other cell gives None.

    Example:
        >>> number_of(" 2.50 "), number_of(3), number_of("1_000"), number_of(True)
        (2.5, 3.0, None, None)
    """
    text = str(value).strip()
    if not _NUMBER.fullmatch(text):
        return None
    return float(text) if math.isfinite(float(text)) else None


def infer_spec(
    table: Table,
    columns: tuple[str, ...],
    label: str,
    num_labels: int | None = None,
    names: Sequence[str] | None = None,
) -> TaskSpec:
    """Infers a task from the labels of a training table, as `load_files` explains.

    If ``names`` are given (in the order of their ids), the labels are such names. No label may be missing: see `complete`.

    Raises:
        DataError: A label is a list, a text is among numbers, the ids do not run from 0, or there are fewer than two
            classes.
    """
    values = table.column(label)
    for row, value in enumerate(values):
        if isinstance(value, list | dict):
            raise DataError(
                f"{table.where(row)}: label {shown(value)} in column {label!r} is a {type(value).__name__}; a text has one label "
                "here. Write one class or number in each row; lists of tags, one for each word, go with --task ner."
            )
    numbers = [number_of(value) for value in values]
    what = f"{table.source}: column {label!r}"
    if names is None and all(number is None for number in numbers):
        names = sorted({str(value).strip() for value in values})
    if names is None:
        if None in numbers:
            odd = numbers.index(None)
            raise DataError(
                f"{table.where(odd)}: label {shown(values[odd])} in column {label!r} is not a number, but others are. Mend "
                f"that row, or, if these are names of classes, write every one as text.{_and_more(numbers.count(None) - 1)}"
            )
        known = [number for number in numbers if number is not None]
        fractions = [number for number in known if not number.is_integer()]
        if num_labels == 1 or (num_labels is None and fractions):
            return TaskSpec(CUSTOM, columns, 1, None, default_metrics(1), default_metrics(1)[0])
        if fractions:
            raise DataError(
                f"{what} holds {fractions[0]!r}, which is not a class id; num_labels = {num_labels} needs ids."
            )
        found = sorted({int(number) for number in known})
        count = num_labels or len(found)
        if found[0] < 0 or found[-1] >= count:
            more = f"or give more classes (--num-labels {found[-1] + 1}), " if found[0] >= 0 else ""
            raise DataError(
                f"{what} holds the whole numbers {listed(map(str, found), _MOST_SHOWN)}; {count} classes have the ids 0 to "
                f"{count - 1}. Renumber them, or write them as text, {more}or, for a regression on whole numbers, give "
                "--num-labels 1 (num_labels=1)."
            )
        names = [str(i) for i in range(count)]
    if len(names) < 2:
        raise DataError(f"{what} has only one class ({shown(names[0])}); there is nothing to learn.")
    if num_labels not in (None, len(names)):
        raise DataError(
            f"{what} has {len(names)} classes ({listed(names, _MOST_SHOWN)}); num_labels = {num_labels} does not fit."
        )
    metrics = default_metrics(len(names))
    return TaskSpec(CUSTOM, columns, len(names), tuple(names), metrics, metrics[0])
