"""What a task is: its texts, its labels, its metrics, and where the hub keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.errors import DataError

CUSTOM = "custom"  # the name of every task that is inferred from the user's own data
CLASS_METRICS = ("accuracy", "f1", "matthews")
REAL_METRICS = ("pearson", "spearman", "pearson_spearman", "mse")


@dataclass(frozen=True)
class HubSource:
    """Where the Hugging Face hub keeps a task.

    Attributes:
        path: Data set id, e.g. ``"nyu-mll/glue"``.
        config: Its configuration, e.g. ``"sst2"``.
        texts: Its names of the text columns, in the order of `TaskSpec.text_columns`.
        label: Its label column.
        train: Its training split.
        evals: Pairs (its split, our name) of the evaluation splits.
        revision: A branch, where the main one cannot be loaded.
    """

    path: str
    config: str | None
    texts: tuple[str, ...]
    label: str = "label"
    train: str = "train"
    evals: tuple[tuple[str, str], ...] = (("validation", "dev"),)
    revision: str | None = None


@dataclass(frozen=True)
class TaskSpec:
    """A classification or regression task on one text or a pair of texts.

    Attributes:
        name: E.g. ``"sst2"``.
        text_columns: One or two column names.
        num_labels: Classes; 1 for regression.
        label_names: Names of the classes in the order of their ids; None for regression or plain ids.
        metrics: What is reported, of accuracy, f1, matthews, or of pearson, spearman, pearson_spearman, mse.
        main_metric: What runs are compared by; higher is better, but for mse.
        label_range: Least and greatest label of a regression; None for no bound.
        hub: Where the hub keeps it, if it does.

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

    def __post_init__(self) -> None:
        if len(self.text_columns) not in (1, 2):
            raise DataError(f"task {self.name!r}: text_columns = {self.text_columns}; there must be one or two.")
        if self.num_labels < 1:
            raise DataError(f"task {self.name!r}: num_labels = {self.num_labels}; it must be 1 (regression) or more.")
        if self.label_names is not None and len(self.label_names) != self.num_labels:
            raise DataError(f"task {self.name!r}: {len(self.label_names)} label_names for {self.num_labels} labels.")
        self._check_metrics()

    def _check_metrics(self) -> None:
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
        """Whether labels are real numbers."""
        return self.num_labels == 1

    @property
    def greater_is_better(self) -> bool:
        """Whether a greater main metric is a better one."""
        return self.main_metric != "mse"

    @property
    def takes_ids(self) -> bool:
        """Whether labels may be written as ids: not where the user's own data names its classes by text.

        There the text "1" is a class that training has not seen, and not the second class.
        """
        plain = self.label_names in (None, tuple(str(i) for i in range(self.num_labels)))
        return plain or self.name != CUSTOM
