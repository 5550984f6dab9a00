"""Loads GLUE tasks from folders, in the official layout or as samples in json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import DataError
from unmask.lab.tasks.tables import SUFFIXES, Table, listed, listing, only_file, read_table, suffix_of, task_folder
from unmask.lab.tasks.text.labels import examples
from unmask.lab.tasks.text.spec import Examples, TaskSpec

_TWO = (("sentence1", "#1 String", "text_a"), ("sentence2", "#2 String", "text_b"))


@dataclass(frozen=True)
class _Layout:
    """The layout of a task's files.

    Attributes:
        folder: The official name of the task's folder.
        texts: The names that the column of each text may have. The first one that the file has is taken.
        label: The names that the label column may have, likewise.
        header: The column names of files that have no header line.
        evals: The names of the evaluation files, of which one is enough.
        defects: True if the official files have rows that are cut short (which are left out, as on the hub) or have an
            empty text (which are kept, as on the hub).
    """

    folder: str
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...] = ("label",)
    header: tuple[str, ...] | None = None
    evals: tuple[str, ...] = ("dev",)
    defects: bool = False


_LAYOUTS: Mapping[str, _Layout] = {
    "cola": _Layout("CoLA", (("sentence", "text_a"),), header=("source", "label", "mark", "sentence")),
    "sst2": _Layout("SST-2", (("sentence", "text_a"),)),
    "mrpc": _Layout("MRPC", _TWO, ("label", "Quality")),
    "rte": _Layout("RTE", _TWO),
    "stsb": _Layout("STS-B", _TWO, ("label", "score")),
    "qnli": _Layout("QNLI", (("question", "text_a"), ("sentence", "text_b"))),
    "qqp": _Layout("QQP", (("question1", "text_a"), ("question2", "text_b")), ("label", "is_duplicate"), defects=True),
    "mnli": _Layout(
        "MNLI",
        (("premise", "sentence1", "text_a"), ("hypothesis", "sentence2", "text_b")),
        ("label", "gold_label"),
        evals=("dev_matched", "dev_mismatched", "dev"),
    ),
}


def load_folder(
    spec: TaskSpec, data_dir: Path, need_train: bool
) -> tuple[Examples, dict[str, Examples], tuple[str, ...]]:
    """Loads the training split, the evaluation splits by file name, and notes, from a task's folder or the one that holds it.

    Raises:
        DataError: A folder or file is missing, there are two files for one split, or a row is bad.
    """
    layout = _LAYOUTS[spec.name]
    folder = task_folder(data_dir, spec.name, _LAYOUTS)
    paths = {split: only_file(folder, [split], SUFFIXES) for split in ("train", *layout.evals)}
    if folder == data_dir and not any(paths.values()):
        raise DataError(f"there is neither a folder {layout.folder!r} nor train.tsv: {listing(folder)}.")
    evals = [split for split in layout.evals if paths[split] is not None]
    lacking = [] if evals else [layout.evals[0]]
    lacking += ["train"] if need_train and paths["train"] is None else []
    if lacking:
        raise DataError(f"{spec.name} needs {' and '.join(f'{name}.tsv' for name in lacking)}; {listing(folder)}.")
    loaded, notes = {"train": Examples([], [] if len(spec.text_columns) > 1 else None, [])}, []
    for split, path in paths.items():
        if path is None:
            continue
        table = read_table(path, layout.header if suffix_of(path) == ".tsv" else None, skip_short=layout.defects)
        columns = [_pick(table, names) for names in layout.texts]
        loaded[split] = examples(spec, table, columns, _pick(table, layout.label), keep_empty=layout.defects)
        if table.skipped:
            notes.append(f"{path.name}: {table.skipped} rows that are cut short are left out, as on the hub")
    return loaded["train"], {split: loaded[split] for split in evals}, tuple(notes)


def _pick(table: Table, names: tuple[str, ...]) -> str:
    for name in names:
        if name in table.columns:
            return name
    raise DataError(
        f"{table.source} has no column {' or '.join(map(repr, names))}; its columns are {listed(table.columns)}."
    )
