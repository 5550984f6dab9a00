"""GLUE tasks from folders: the official layout, and samples as json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import DataError
from unmask.lab.tasks.tables import SUFFIXES, Table, listed, listing, read_table, suffix_of
from unmask.lab.tasks.text.data import Examples, examples
from unmask.lab.tasks.text.spec import TaskSpec

_TWO = (("sentence1", "#1 String", "text_a"), ("sentence2", "#2 String", "text_b"))
_ENDINGS = tuple(suffix + zipped for suffix in SUFFIXES for zipped in ("", ".gz"))
_Loaded = tuple[Examples, dict[str, Examples], tuple[str, ...]]


@dataclass(frozen=True)
class _Layout:
    """How a task's files look.

    Attributes:
        folder: Official name of the task's folder.
        texts: For each text the names its column may have; the first that is there is taken.
        label: The same for the label.
        header: Column names of files that have no header line.
        evals: Names of the evaluation files; one of a group is enough.
        defects: The official files have rows that are cut short (left out, as the hub does) or have an empty text
            (kept, likewise).
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


def load_folder(spec: TaskSpec, data_dir: Path, need_train: bool) -> _Loaded:
    """Loads a task's splits from a folder.

    Args:
        spec: A task of the GLUE table.
        data_dir: The task's folder, or the one that holds it.
        need_train: Whether a missing training file is an error; else the training split is empty.

    Returns:
        Training split, evaluation splits by file name, notes.

    Raises:
        DataError: A missing folder or file, two files for one split, or a bad row.
    """
    layout = _LAYOUTS[spec.name]
    folder = _task_folder(data_dir, spec.name, layout)
    paths = {split: _find(folder, split) for split in ("train", *layout.evals)}
    evals = [split for split in layout.evals if paths[split] is not None]
    lacking = [] if evals else [layout.evals[0]]
    lacking += ["train"] if need_train and paths["train"] is None else []
    if lacking:
        raise DataError(f"{spec.name} needs {' and '.join(f'{name}.tsv' for name in lacking)}; {listing(folder)}.")
    loaded = {split: _split(spec, layout, path) for split, path in paths.items() if path is not None}
    train = loaded["train"][0] if "train" in loaded else _empty(spec)
    return (
        train,
        {split: loaded[split][0] for split in evals},
        tuple(note for _, notes in loaded.values() for note in notes),
    )


def _task_folder(given: Path, name: str, layout: _Layout) -> Path:
    if not given.is_dir():
        raise DataError(f"there is no data folder {str(given)!r}; {listing(given.parent)}.")
    inside = [path for path in sorted(given.iterdir()) if path.is_dir() and _task_of(path) == name]
    if len(inside) > 1:
        raise DataError(f"{str(given)!r} holds more than one folder for {name}: {inside[0].name}, {inside[1].name}.")
    if inside:
        return inside[0]
    other = _task_of(given)
    if other in _LAYOUTS and other != name:  # many tasks share one format: the wrong one would load without complaint
        raise DataError(f"{str(given)!r} is the folder of {other}, not of {name} ({layout.folder}).")
    if any(_find(given, split) for split in ("train", *layout.evals)):
        return given
    raise DataError(f"there is neither a folder {layout.folder!r} nor train.tsv: {listing(given)}.")


def _task_of(folder: Path) -> str:
    """``SST-2``, ``sst2`` and the like all give ``sst2``."""
    return folder.resolve().name.lower().replace("-", "").replace("_", "")


def _find(folder: Path, split: str) -> Path | None:
    there = [folder / (split + ending) for ending in _ENDINGS if (folder / (split + ending)).is_file()]
    if len(there) > 1:
        raise DataError(f"{str(folder)!r} holds both {there[0].name} and {there[1].name}; leave one.")
    return there[0] if there else None


def _split(spec: TaskSpec, layout: _Layout, path: Path) -> tuple[Examples, list[str]]:
    table = read_table(path, layout.header if suffix_of(path) == ".tsv" else None, skip_short=layout.defects)
    columns = [_pick(table, names) for names in layout.texts]
    found = examples(spec, table, columns, _pick(table, layout.label), keep_empty=layout.defects)
    notes = (
        [f"{path.name}: {table.skipped} rows that are cut short are left out, as on the hub"] if table.skipped else []
    )
    return found, notes


def _pick(table: Table, names: tuple[str, ...]) -> str:
    for name in names:
        if name in table.columns:
            return name
    raise DataError(
        f"{table.source} has no column {' or '.join(map(repr, names))}; its columns are {listed(table.columns)}."
    )


def _empty(spec: TaskSpec) -> Examples:
    return Examples([], [] if len(spec.text_columns) > 1 else None, [])
