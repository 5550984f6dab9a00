"""Loads data sets of the Hugging Face hub through the ``datasets`` library, and tells a hub id from a file's path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import DataError, need
from unmask.lab.tasks.tables import Table, listing, suffix_of, unknown_column

EVALUATION_SPLITS = ("validation", "test")
"""The splits of a hub data set that may be evaluated on. The first one that the data set has is taken."""
_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class HubSource:
    """The place of a task's data on the Hugging Face hub.

    Attributes:
        path: The data set's id, such as ``"nyu-mll/glue"``.
        config: The data set's configuration, such as ``"sst2"``.
        texts: The hub's names of the text columns, in the order of `TaskSpec.text_columns`.
        label: The hub's name of the label column.
        evals: Pairs (the hub's name, our name) of the evaluation splits. The training split is ``"train"`` on both sides.
        revision: A branch, if the main one cannot be loaded.
    """

    path: str
    config: str | None
    texts: tuple[str, ...]
    label: str = "label"
    evals: tuple[tuple[str, str], ...] = (("validation", "dev"),)
    revision: str | None = None

    def tables(self) -> dict[str, Table]:
        """Reads the columns of the training and the evaluation splits, by our name of the split.

        Raises:
            DataError: The reasons are those of `load_splits` and `split_table`.
        """
        instead = "give the folder of the task's files with data_dir"
        splits = load_splits(self.path, self.config, instead, self.revision)
        where, columns = f"{self.path}:{self.config}" if self.config else self.path, (*self.texts, self.label)
        pairs = (("train", "train"), *self.evals)
        return {ours: split_table(splits, theirs, where, columns) for theirs, ours in pairs}


@dataclass(frozen=True)
class Origin:
    """The place that a user names for examples: a file, or a data set of the hub, which has splits by name."""

    name: str
    splits: Mapping[str, Any] | None

    @property
    def evaluates(self) -> bool:
        """True if this is a hub data set with a split to evaluate on."""
        return self.splits is not None and any(split in self.splits for split in EVALUATION_SPLITS)

    def first_of(self, splits: Sequence[str]) -> str:
        """Returns the first of these splits that the hub data set has, or the first one if it has none of them."""
        return next((split for split in splits if split in (self.splits or ())), splits[0])


def origin_of(source: str | Path, suffixes: Sequence[str]) -> Origin:
    """Loads the splits of a source that is a hub data set and not a file.

    A source is a file if it exists or ends in one of the suffixes, so that a missing file is refused under its own name.

    Raises:
        DataError: The source is neither, or the hub data set cannot be loaded.
    """
    path = Path(source)
    if path.exists() or suffix_of(path) in suffixes:
        return Origin(str(source), None)
    if not _ID.fullmatch(str(source)):
        raise DataError(
            f"there is no file {str(path)!r} ({listing(path.parent)}), and it is not a hub id of the form 'user/name' or "
            f"'user/name:config'. A file's name must end in {', '.join(suffixes)}."
        )
    name, _, config = str(source).partition(":")
    return Origin(str(source), load_splits(name, config or None, f"give a file ({', '.join(suffixes)})"))


def load_splits(path: str, config: str | None, instead: str, revision: str | None = None) -> Mapping[str, Any]:
    """Loads all splits of a data set. The error says ``instead``: what the user can do without the hub.

    Raises:
        DataError: There is no network, no such data set or configuration, or the cache is damaged.
    """
    datasets = need("datasets", "hf")
    try:
        return datasets.load_dataset(path, config, **({} if revision is None else {"revision": revision}))
    except Exception as error:  # the library and its file systems raise dozens of classes
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"the data set {path!r}{f' ({config})' if config else ''} cannot be loaded from the hub "
            f"({type(error).__name__}: {lines[-1]}). Check the id and the network (and HF_HUB_OFFLINE), or {instead}."
        ) from error


def split_table(splits: Mapping[str, Any], split: str, source: str, columns: Sequence[str]) -> Table:
    """Reads some columns of one split. Class ids become class names if the data set names its classes.

    Raises:
        DataError: The data set has no such split or column, or the split is empty.
    """
    if split not in splits:
        raise DataError(f"{source} has no split {split!r}; its splits are {', '.join(map(repr, splits))}.")
    dataset = splits[split]
    where = f"{source}, split {split!r}"
    for column in columns:
        if column not in dataset.column_names:
            raise unknown_column(where, column, dataset.column_names)
    if not len(dataset):
        raise DataError(f"{where} is empty: it holds no examples.")
    values = dataset.select_columns(list(dict.fromkeys(columns)))[:]
    named = {column: _named(values[column], class_names(dataset, column)) for column in columns}
    return Table(where, named, range(1, len(dataset) + 1))


def class_names(dataset: Any, column: str) -> tuple[str, ...] | None:
    """Returns the names of a column's classes in the order of their ids, or None if the data set has no names."""
    kind = dataset.features[column]
    names = getattr(getattr(kind, "feature", kind), "names", None)  # a column of lists has them on its items
    return tuple(names) if names else None


def _named(value: Any, names: tuple[str, ...] | None) -> Any:
    """Replaces class ids, also in lists, by names.

    An id that has no name stays (the hub writes -1 for "no label"), and the task refuses it later.
    """
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if value is not None and 0 <= value < len(names) else value
