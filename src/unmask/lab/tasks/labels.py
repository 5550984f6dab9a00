"""Labels as they stand in files, turned into class ids or real numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from unmask.errors import DataError
from unmask.lab.tasks.tables import Table, listed
from unmask.lab.tasks.text.spec import CUSTOM, TaskSpec
from unmask.reading import shown

# float() would also take "1_000", "nan", "infinity"; none of these is a number in a data file.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MOST_SHOWN = 12


def decode(spec: TaskSpec, value: Any) -> int | float:
    """One label.

    Args:
        spec: Says what labels there are.
        value: A class name, a class id or a real number, as text or as a number.

    Returns:
        A class id in 0 to num_labels - 1, or a real number for regression.

    Raises:
        DataError: It is none of the task's labels.

    Example:
        >>> spec = TaskSpec("t", ("text",), 2, ("bad", "good"), ("accuracy",), "accuracy")
        >>> decode(spec, "good"), decode(spec, "0"), decode(spec, 1.0)
        (1, 0, 1)
    """
    if is_missing(value):
        raise DataError(f"the label is missing ({shown(value)}); mend or drop the row.")
    if isinstance(value, list | dict):
        raise DataError(f"label {shown(value)} is neither a text nor a number; mend or drop the row.")
    if spec.regression:
        return _real(spec, value)
    name = str(value).strip()
    if spec.label_names is not None and name in spec.label_names:
        return spec.label_names.index(name)
    number = float(value) if isinstance(value, bool) else number_of(value)
    if spec.takes_ids and number is not None and number in range(spec.num_labels):
        return int(number)
    raise DataError(f"label {shown(value)} is none of task {spec.name!r}; allowed: {_allowed(spec)}.")


def _real(spec: TaskSpec, value: Any) -> float:
    number = number_of(value)
    if number is None:
        raise DataError(f"label {shown(value)} is no finite number, and task {spec.name!r} is a regression.")
    if spec.label_range is not None and not spec.label_range[0] <= number <= spec.label_range[1]:
        low, high = spec.label_range
        raise DataError(f"label {shown(value)} is outside the range of task {spec.name!r}: {low:g} to {high:g}.")
    return number


def _allowed(spec: TaskSpec) -> str:
    ids = f"0 to {spec.num_labels - 1}" if spec.takes_ids else ""
    names = listed(spec.label_names, _MOST_SHOWN) if spec.label_names else ""
    return " or ".join(part for part in (ids, names) if part)


def is_missing(value: Any) -> bool:
    """Whether a cell is None, NaN or blank.

    Example:
        >>> [is_missing(value) for value in (None, float("nan"), " ", "NaN", 0, "none")]
        [True, True, True, True, False, False]
    """
    return value is None or str(value).strip().lower() in ("", "nan", "<na>", "nat")


def number_of(value: Any) -> float | None:
    """A cell as a finite number, or None.

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
    """The task that a training table's labels make.

    Text labels are class names (ids in sorted order), whole numbers are class ids, numbers of which one or more has a
    fraction make a regression.

    Args:
        table: Training rows.
        columns: The text columns, one or two.
        label: The label column.
        num_labels: Classes, where training need not show them all; 1 for a regression on whole numbers.
        names: The class names in the order of their ids, where the source tells them; the labels are such names then.

    Raises:
        DataError: A missing label, text among numbers, ids that do not run from 0, or fewer than two classes.
    """
    values = table.column(label)
    for row, value in enumerate(values):
        if is_missing(value):
            raise DataError(
                f"{table.where(row)}: the label is missing ({label!r} is {shown(value)}); mend or drop the row."
            )
    numbers = [number_of(value) for value in values]
    what = f"{table.source}: column {label!r}"
    if names is not None:
        return _classes(what, columns, tuple(names), num_labels)
    if all(number is None for number in numbers):
        return _classes(what, columns, tuple(sorted({str(value).strip() for value in values})), num_labels)
    if None in numbers:
        raise _mixed(table, label, values, numbers.index(None))
    return _numeric(what, columns, [number for number in numbers if number is not None], num_labels)


def _mixed(table: Table, label: str, values: Sequence[Any], odd: int) -> DataError:
    return DataError(
        f"{table.where(odd)}: label {shown(values[odd])} in column {label!r} is no number, but others are. Mend that row, or, "
        "if these are names of classes, write every one as text."
    )


def _numeric(what: str, columns: tuple[str, ...], numbers: list[float], num_labels: int | None) -> TaskSpec:
    fractions = [number for number in numbers if not number.is_integer()]
    if num_labels == 1 or (num_labels is None and fractions):
        return TaskSpec(
            CUSTOM, columns, 1, None, ("pearson", "spearman", "pearson_spearman", "mse"), "pearson_spearman"
        )
    if fractions:
        raise DataError(f"{what} holds {fractions[0]!r}, which is no class id; num_labels = {num_labels} needs ids.")
    found = sorted({int(number) for number in numbers})
    count = num_labels or len(found)
    if found[0] < 0 or found[-1] >= count:
        raise DataError(
            f"{what} holds the whole numbers {listed([str(i) for i in found], _MOST_SHOWN)}; {count} classes have the ids 0 to "
            f"{count - 1}. Renumber them, or write them as text, or, for a regression, with a fraction in some row (or "
            "give num_labels=1)."
        )
    return _classes(what, columns, tuple(str(i) for i in range(count)), None)


def _classes(what: str, columns: tuple[str, ...], names: tuple[str, ...], num_labels: int | None) -> TaskSpec:
    if len(names) < 2:
        raise DataError(f"{what} has only one class ({shown(names[0])}); there is nothing to learn.")
    if num_labels not in (None, len(names)):
        raise DataError(
            f"{what} has {len(names)} classes ({listed(names, _MOST_SHOWN)}); num_labels = {num_labels} does not fit."
        )
    metrics = ("accuracy", "f1") if len(names) == 2 else ("accuracy",)
    return TaskSpec(CUSTOM, columns, len(names), names, metrics, "accuracy")
