"""The user's own files, or a data set of the hub, as a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.lab.tasks.hub import class_names, is_hub_id, load_splits, split_table
from unmask.lab.tasks.labels import infer_spec
from unmask.lab.tasks.split import hold_out, shared
from unmask.lab.tasks.tables import SUFFIXES, Table, listing, placed, read_table, suffix_of
from unmask.lab.tasks.text.data import Examples, TaskData, TaskSpec, examples

_Origin = Path | Mapping[str, Any]  # a file, or the splits of a hub data set
_HELD_OUT = 0.1
_HUB_EVALS = ("validation", "test")  # the first that there is
_INSTEAD = f"give a file ({', '.join(SUFFIXES)})"


def load_files(
    train: str | Path,
    evaluation: str | Path | None,
    text: str,
    label: str,
    text_pair: str | None = None,
    *,
    num_labels: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Loads a task from files, or from a data set of the Hugging Face hub.

    Whole-number labels are class ids 0 to k - 1, texts are class names (ids in sorted order, or the hub's), and numbers
    of which one or more has a fraction make it a regression.

    Args:
        train: A file (csv, tsv, jsonl, json, parquet), or a hub id (``"user/name"`` or ``"user/name:config"``), which
            is looked for only where there is no such file.
        evaluation: Likewise; of a hub data set the validation (else the test) split is taken. None: that split of
            ``train`` if it is a hub data set that has one, else a tenth of ``train``, of which no text is trained on.
        text: Text column.
        label: Label column.
        text_pair: Second text column.
        num_labels: Classes, where training need not show them all; 1 for a regression on whole numbers.
        seed: Of the held-out tenth.

    Raises:
        DataError: A missing file, an unknown format or column, a bad row, or a label that training has not.
    """
    columns = (text,) if text_pair is None else (text, text_pair)
    if label in columns or len(set(columns)) < len(columns):
        raise DataError(f"text, text_pair and label must be different columns; they are {(*columns, label)}.")
    origin = _origin(train)
    table = _rows(train, origin, ("train",), (*columns, label))
    names = None if isinstance(origin, Path) else class_names(origin["train"], label)
    spec = infer_spec(table, columns, label, num_labels, names)
    loaded = examples(spec, table, columns, label)
    held = _held_out_table(train, origin, evaluation, (*columns, label))
    if held is None:
        with placed(train):
            rest, tenth = hold_out(loaded, max(1, round(_HELD_OUT * len(loaded))), seed)
        note = f"no evaluation data given: {len(tenth):,} of {len(loaded):,} examples are held out (seed {seed})"
        return TaskData(spec, rest, {"eval": tenth}, (note,))
    against = examples(spec, held, columns, label)
    return TaskData(spec, loaded, {"eval": against}, _overlap(loaded, against))


def load_evaluation(spec: TaskSpec, path: str | Path, text: str, label: str, text_pair: str | None = None) -> Examples:
    """Loads one file (or hub data set) of examples for a task that is already defined, by a trained delta, say.

    Raises:
        DataError: A missing file or column, another number of texts than the task's, or a label that it has not.
    """
    columns = (text,) if text_pair is None else (text, text_pair)
    if len(columns) != len(spec.text_columns):
        raise DataError(
            f"task {spec.name!r} has {len(spec.text_columns)} text columns {spec.text_columns}; {columns} do not fit."
        )
    table = _rows(path, _origin(path), _HUB_EVALS, (*columns, label))
    return examples(spec, table, columns, label)


def _held_out_table(
    train: str | Path, origin: _Origin, evaluation: str | Path | None, columns: Sequence[str]
) -> Table | None:
    """The rows to evaluate on; None: they are to be held out of the training data."""
    if evaluation is not None:
        return _rows(evaluation, _origin(evaluation), _HUB_EVALS, columns)
    if isinstance(origin, Path) or not any(split in origin for split in _HUB_EVALS):
        return None
    return _rows(train, origin, _HUB_EVALS, columns)


def _rows(source: str | Path, origin: _Origin, splits: tuple[str, ...], columns: Sequence[str]) -> Table:
    """The rows of a file, or of the first of these splits that a hub data set has."""
    if isinstance(origin, Path):
        return read_table(origin)
    split = next((name for name in splits if name in origin), splits[0])
    return split_table(origin, split, str(source), columns)


def _origin(source: str | Path) -> _Origin:
    """A file's path, or the splits of a hub data set."""
    if _is_file(source):
        return Path(source)
    name, _, config = str(source).partition(":")
    return load_splits(name, config or None, _INSTEAD)


def _is_file(source: str | Path) -> bool:
    """Whether to read it as a file; else it is a hub id.

    Raises:
        DataError: It is neither.
    """
    path = Path(source)
    if path.exists() or suffix_of(path) in SUFFIXES:
        return True  # a missing file too: read_table says what there is instead
    if is_hub_id(str(source)):
        return False
    raise DataError(
        f"there is no file {str(path)!r} ({listing(path.parent)}), and it is no hub id of the form 'user/name' or "
        "'user/name:config'."
    )


def _overlap(train: Examples, evaluation: Examples) -> tuple[str, ...]:
    count = shared(train, evaluation)
    if not count:
        return ()
    return (f"{count:,} of {len(evaluation):,} evaluation texts are in the training data too: the score is too good",)
