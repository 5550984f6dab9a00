"""Loads a task from the user's own files, or from a data set of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import DataError
from unmask.lab.tasks.hub import EVALUATION_SPLITS, Origin, class_names, origin_of, split_table
from unmask.lab.tasks.split import hold_out_a_tenth, shared
from unmask.lab.tasks.tables import SUFFIXES, Table, TextFormat, placed, read_table
from unmask.lab.tasks.text.labels import complete, examples, infer_spec
from unmask.lab.tasks.text.spec import Examples, TaskData, TaskSpec


def load_files(
    train: str | Path,
    evaluation: str | Path | None,
    text: str,
    label: str,
    text_pair: str | None = None,
    *,
    num_labels: int | None = None,
    seed: int = 0,
    form: TextFormat | None = None,
    drop_missing: bool = False,
) -> TaskData:
    """Loads a task from files, or from a data set of the Hugging Face hub.

    Whole-number labels are class ids 0 to k - 1, and texts are class names (with ids in sorted order, or in the hub's).
    Numbers of which at least one has a fraction make a regression.

    Args:
        train: A file (csv, tsv, jsonl, json, parquet), or a hub id (``"user/name"`` or ``"user/name:config"``), which
            is looked up only if there is no such file.
        evaluation: A file or hub id likewise; of a hub data set the validation (else the test) split is taken. None means
            that split of ``train`` if ``train`` is a hub data set that has one. Otherwise a tenth of ``train`` is held
            out, and none of its texts is trained on.
        text: The text column.
        label: The label column.
        text_pair: The second text column.
        num_labels: The number of classes, where training need not show them all; 1 for a regression on whole numbers.
        seed: The seed of the held-out tenth.
        form: How csv and tsv files are written; None for the usual way.
        drop_missing: Leaves out rows without a text or a label, and says how many; otherwise such a row is an error.

    Raises:
        DataError: A file is missing, a format, column or label is unknown, or a row is bad.
    """
    columns = (text,) if text_pair is None else (text, text_pair)
    if label in columns or len(set(columns)) < len(columns):
        raise DataError(f"text, text_pair and label must be different columns; they are {(*columns, label)}.")
    origin = origin_of(train, SUFFIXES)
    reader = _Reader(columns, label, form, drop_missing)
    table, note = reader.read(origin, ("train",))
    notes = [note]
    names = None if origin.splits is None else class_names(origin.splits["train"], label)
    spec = infer_spec(table, columns, label, num_labels, names)
    loaded = examples(spec, table, columns, label)
    if evaluation is None and not origin.evaluates:
        with placed(train):
            rest, tenth, note = hold_out_a_tenth(loaded, "examples", seed)
        return TaskData(spec, rest, {"eval": tenth}, tuple(filter(None, [*notes, note])))
    held = origin if evaluation is None else origin_of(evaluation, SUFFIXES)
    table, note = reader.read(held, EVALUATION_SPLITS)
    against = examples(spec, table, columns, label)
    count = shared(loaded.keys, against.keys)
    said = f"{count:,} of {len(against):,} evaluation texts are in the training data too: the score is too good"
    return TaskData(spec, loaded, {"eval": against}, tuple(filter(None, [*notes, note, said if count else None])))


def load_evaluation(
    spec: TaskSpec,
    path: str | Path,
    text: str,
    label: str,
    text_pair: str | None = None,
    *,
    form: TextFormat | None = None,
    drop_missing: bool = False,
) -> tuple[Examples, tuple[str, ...]]:
    """Loads one file (or hub data set) of examples for a task that is already defined, for instance by a trained delta.

    Returns:
        The examples, and notes on rows that were left out (see `load_files`).

    Raises:
        DataError: A file or column is missing, the number of texts is not the task's, or a label is none of the task's.
    """
    columns = (text,) if text_pair is None else (text, text_pair)
    if len(columns) != len(spec.text_columns):
        raise DataError(
            f"task {spec.name!r} has {len(spec.text_columns)} text columns {spec.text_columns}; {columns} do not fit."
        )
    table, note = _Reader(columns, label, form, drop_missing).read(origin_of(path, SUFFIXES), EVALUATION_SPLITS)
    return examples(spec, table, columns, label), tuple(filter(None, [note]))


@dataclass(frozen=True)
class _Reader:
    """Reads the tables of a task, all in one way."""

    columns: tuple[str, ...]
    label: str
    form: TextFormat | None
    drop_missing: bool

    def read(self, origin: Origin, splits: Sequence[str]) -> tuple[Table, str | None]:
        """Reads a file, or the first of these splits that a hub data set has; returns its complete rows and a note."""
        if origin.splits is None:
            table = read_table(Path(origin.name), form=self.form)
        else:
            table = split_table(origin.splits, origin.first_of(splits), origin.name, (*self.columns, self.label))
        return complete(table, self.columns, self.label, self.drop_missing)
