"""The values that describe a task of classification or regression: the task itself, its examples and its splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unmask.errors import DataError
from unmask.lab.tasks.hub import HubSource
from unmask.lab.tasks.split import Loaded, text_key

CUSTOM = "custom"
"""The name of every task that is inferred from the user's own data."""
CLASS_METRICS = ("accuracy", "f1", "matthews")
REAL_METRICS = ("pearson_spearman", "pearson", "spearman", "mse")


@dataclass(frozen=True)
class TaskSpec:
    """A classification or regression task on one text or a pair of texts.

    Attributes:
        name: The task's name, such as ``"sst2"``.
        text_columns: One or two column names.
        num_labels: The number of classes; 1 means regression.
        label_names: The names of the classes in the order of their ids; None for regression or plain ids.
        metrics: The metrics to report: accuracy, f1, matthews, or pearson, spearman, pearson_spearman, mse.
        main_metric: The metric that runs are compared by. A higher one is better, except for mse.
        label_range: The least and the greatest label of a regression; None for no bound.
        hub: The task's place on the hub, if it has one.
        sizes: The number of examples of the official splits, by our name of the split.

    Raises:
        DataError: The parts do not fit together.

    Example:
        >>> TaskSpec("stars", ("review",), 1, None, ("mse",), "mse").greater_is_better
        False
    """

    name: str
    text_columns: tuple[str, ...]
    num_labels: int
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    main_metric: str
    label_range: tuple[float, float] | None = None
    hub: HubSource | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.text_columns) not in (1, 2):
            raise DataError(f"task {self.name!r}: text_columns = {self.text_columns}; there must be one or two.")
        if self.num_labels < 1:
            raise DataError(f"task {self.name!r}: num_labels = {self.num_labels}; it must be 1 (regression) or more.")
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise DataError(f"task {self.name!r}: {len(self.label_names)} label_names for {self.num_labels} labels.")
        allowed = REAL_METRICS if self.regression else CLASS_METRICS
        for metric in self.metrics:
            if metric not in allowed or (metric == "f1" and self.num_labels != 2):
                raise DataError(
                    f"task {self.name!r}: metric {metric!r} does not fit {self.num_labels} labels; there are "
                    f"{', '.join(allowed)} (f1 for two classes only)."
                )
        if self.main_metric not in self.metrics:
            raise DataError(f"task {self.name!r}: main_metric = {self.main_metric!r} is not among {self.metrics}.")

    @property
    def regression(self) -> bool:
        """True if labels are real numbers."""
        return self.num_labels == 1

    @property
    def greater_is_better(self) -> bool:
        """True if a greater main metric is a better one."""
        return self.main_metric != "mse"

    @property
    def takes_ids(self) -> bool:
        """True if labels may be written as ids, which they may not if the user's own data name the classes by text.

        There the text "1" is a class that training has not seen, and not the second class.
        """
        plain = self.label_names in (None, tuple(str(i) for i in range(self.num_labels)))
        return plain or self.name != CUSTOM


def default_metrics(num_labels: int) -> tuple[str, ...]:
    """Returns the metrics of a task that names none, the main one first.

    Example:
        >>> default_metrics(2), default_metrics(3)
        (('accuracy', 'f1'), ('accuracy',))
    """
    if num_labels == 1:
        return REAL_METRICS
    return ("accuracy", "f1") if num_labels == 2 else ("accuracy",)


@dataclass(frozen=True)
class Examples:
    """Texts with labels, which can be split as `unmask.lab.tasks.split.Rows`.

    Attributes:
        texts: The first texts.
        pairs: The second texts, or None.
        labels: Class ids, or real numbers for regression.

    Raises:
        DataError: The lists differ in length.
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

    @property
    def keys(self) -> list[str]:
        pairs = self.pairs or [""] * len(self)
        return [text_key(text, pair) for text, pair in zip(self.texts, pairs, strict=True)]

    def take(self, rows: Sequence[int]) -> Examples:
        """Returns the examples of the given rows, in that order.

        Example:
            >>> Examples(["a", "b", "c"], None, [0, 1, 0]).take([2, 1])
            Examples(texts=['c', 'b'], pairs=None, labels=[0, 1])
        """
        pairs = None if self.pairs is None else [self.pairs[row] for row in rows]
        labels: Any = [self.labels[row] for row in rows]
        return Examples([self.texts[row] for row in rows], pairs, labels)

    def by_length(self) -> Examples:
        """Returns the examples sorted by length, because batches of similar lengths need little padding.

        Example:
            >>> Examples(["abc", "b", "cd"], ["", "", "efg"], [0, 1, 2]).by_length().labels
            [1, 0, 2]
        """
        pairs = self.pairs or [""] * len(self)
        return self.take(sorted(range(len(self)), key=lambda row: len(self.texts[row]) + len(pairs[row])))


TaskData = Loaded[TaskSpec, Examples]
"""A loaded task of classification or regression."""
