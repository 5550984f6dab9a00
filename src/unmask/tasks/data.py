"""What a task is, and what a loaded one holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unmask.errors import DataError


@dataclass(frozen=True)
class TaskSpec:
    """A classification or regression task on one text or a pair of texts.

    Attributes:
        name: E.g. ``"sst2"``.
        text_columns: One or two column names.
        num_labels: Classes; 1 for regression.
        label_names: Names of the classes in the order of their ids; None for regression or plain ids.
        metrics: What is reported, of accuracy, f1, matthews, pearson, spearman, pearson_spearman, mse.
        main_metric: What runs are compared by; higher is better, but for mse.
    """

    name: str
    text_columns: tuple[str, ...]
    num_labels: int
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    main_metric: str

    @property
    def regression(self) -> bool:
        """Whether labels are real numbers."""
        return self.num_labels == 1


@dataclass(frozen=True)
class Examples:
    """Texts with labels.

    Attributes:
        texts: First texts.
        pairs: Second texts, or None.
        labels: Class ids, or real numbers for regression.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TaskData:
    """A loaded task: a training split and one or more evaluation splits by name."""

    spec: TaskSpec
    train: Examples
    evals: Mapping[str, Examples]
    notes: tuple[str, ...] = field(default=())


def examples(
    spec: TaskSpec, rows: Sequence[Mapping[str, object]], columns: Sequence[str], label: str, source: str
) -> Examples:
    """Builds examples from rows, and checks each.

    Args:
        spec: Says how many texts and which labels there are.
        rows: Mappings of column to value.
        columns: The text columns, one or two.
        label: The label column.
        source: Names the rows' origin in errors.

    Raises:
        DataError: No rows, a missing column, an empty text, or a label outside the task's.

    Example:
        >>> spec = TaskSpec("t", ("text",), 2, ("bad", "good"), ("accuracy",), "accuracy")
        >>> examples(spec, [{"text": "fine", "label": "good"}], ["text"], "label", "here").labels
        [1]
    """
    if not rows:
        raise DataError(f"{source} holds no examples.")
    for column in (*columns, label):
        if column not in rows[0]:
            raise DataError(f"{source} has no column {column!r}; its columns are {', '.join(map(str, rows[0]))}.")
    texts = [[_text(row[c], c, source, i) for i, row in enumerate(rows, 1)] for c in columns]
    labels = [_label(spec, row[label], source, i) for i, row in enumerate(rows, 1)]
    return Examples(texts[0], texts[1] if len(texts) > 1 else None, labels)  # type: ignore[arg-type]


def _text(value: object, column: str, source: str, row: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{source}, row {row}: column {column!r} holds {value!r}, which is no text; mend or drop the row."
        )
    return value


def _label(spec: TaskSpec, value: object, source: str, row: int) -> int | float:
    where = f"{source}, row {row}: label {value!r}"
    try:
        number = float(str(value).strip())
    except ValueError:
        number = math.nan
    if spec.regression:
        if not math.isfinite(number):
            raise DataError(f"{where} is no finite number.")
        return number
    if spec.label_names and str(value).strip() in spec.label_names:
        return spec.label_names.index(str(value).strip())
    if number in range(spec.num_labels):
        return int(number)
    names = f" or one of {', '.join(spec.label_names)}" if spec.label_names else ""
    raise DataError(f"{where} is outside the range: task {spec.name!r} has ids 0 to {spec.num_labels - 1}{names}.")
