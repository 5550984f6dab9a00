"""Data sets of the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from unmask.errors import DataError, need
from unmask.lab.tasks.tables import Table, unknown_column

_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def is_hub_id(source: str) -> bool:
    """Whether a string has the form ``user/name`` or ``user/name:config``.

    Example:
        >>> is_hub_id("nyu-mll/glue:sst2"), is_hub_id("train.csv"), is_hub_id("../a/b")
        (True, False, False)
    """
    return _ID.fullmatch(source) is not None and not source.startswith(".")


def load_splits(path: str, config: str | None, instead: str, revision: str | None = None) -> Mapping[str, Any]:
    """Loads all splits of a data set.

    Args:
        path: ``user/name``.
        config: Configuration, if it has several.
        instead: For the error: what to do without the hub.
        revision: A branch other than the main one.

    Raises:
        DataError: It cannot be had: no network, no such data set or configuration, a damaged cache.
    """
    datasets = need("datasets", "hf")
    try:
        return datasets.load_dataset(path, config, **({} if revision is None else {"revision": revision}))
    except Exception as error:  # datasets and its file systems raise dozens of kinds
        lines = str(error).strip().splitlines() or [""]
        raise DataError(
            f"the data set {path!r}{f' ({config})' if config else ''} cannot be loaded from the hub "
            f"({type(error).__name__}: {lines[-1]}). Check the id and the network (and HF_HUB_OFFLINE), or {instead}."
        ) from error


def split_table(splits: Mapping[str, Any], split: str, source: str, columns: Sequence[str]) -> Table:
    """Some columns of one split; class ids become class names where the data set names its classes.

    Raises:
        DataError: There is no such split or column.
    """
    if split not in splits:
        raise DataError(f"{source} has no split {split!r}; its splits are {', '.join(map(repr, splits))}.")
    dataset = splits[split]
    where = f"{source}, split {split!r}"
    for column in columns:
        if column not in dataset.column_names:
            raise unknown_column(where, column, dataset.column_names)
    values = dataset.select_columns(list(dict.fromkeys(columns)))[:]
    named = {column: _named(values[column], class_names(dataset, column)) for column in columns}
    if not len(dataset):
        raise DataError(f"{where} is empty: it holds no examples.")
    return Table(where, named, range(1, len(dataset) + 1))


def class_names(dataset: Any, column: str) -> tuple[str, ...] | None:
    """The names of a column's classes in the order of their ids, if the data set tells them."""
    kind = dataset.features[column]
    names = getattr(getattr(kind, "feature", kind), "names", None)  # of a list: those of its items
    return tuple(names) if names else None


def _named(values: Sequence[Any], names: tuple[str, ...] | None) -> Sequence[Any]:
    """Ids (or lists of ids) as names. An id outside them (the hub writes -1 for "no label") stays, and is refused later."""
    if names is None:
        return values
    return [_name(value, names) for value in values]


def _name(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_name(item, names) for item in value]
    return names[value] if value is not None and 0 <= value < len(names) else value
