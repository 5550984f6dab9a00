"""Tagged sentences from a folder of column files, from one file or table, and from the hub."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.lab.tasks.hub import is_hub_id, load_splits, split_table
from unmask.lab.tasks.tables import Table, listing, read_table, suffix_of
from unmask.lab.tasks.tags.conll import SUFFIXES, read_conll
from unmask.lab.tasks.tags.spans import is_tag
from unmask.lab.tasks.tags.tagged import Sentences, normalised
from unmask.lab.tasks.text.spec import HubSource

Loaded = tuple[Sentences, tuple[str, ...]]  # and notes
_TABLES = (".jsonl", ".json", ".parquet")  # whose cells can hold lists
_ENDINGS = tuple(suffix + zipped for suffix in ("", *SUFFIXES) for zipped in ("", ".gz"))

# Names of a split's file, without the suffix; the data sets' own first.
_FILES: Mapping[str, tuple[str, ...]] = {
    "train": ("eng.train", "wnut17train", "train"),
    "dev": ("eng.testa", "emerging.dev", "dev", "valid", "validation", "testa"),
    "test": ("eng.testb", "emerging.test.annotated", "emerging.test", "test", "testb"),
}


def load_folder(name: str, given: Path, need_train: bool, others: Collection[str]) -> dict[str, Loaded]:
    """The splits that a folder has, of train, dev and test.

    Args:
        name: The task's.
        given: The folder of its files, or the one that holds it.
        need_train: Whether a missing training file is an error.
        others: Names of the tasks that have a folder of their own; another one's is refused.

    Raises:
        DataError: A missing folder or file, two files for one split, or a bad line.
    """
    if not given.is_dir():
        raise DataError(f"there is no data folder {str(given)!r}; {listing(given.parent)}.")
    inside = [path for path in sorted(given.iterdir()) if path.is_dir() and _plain(path) == name]
    folder = inside[0] if inside else given
    if _plain(folder) in others and _plain(folder) != name:  # one format: the wrong one would load without complaint
        raise DataError(f"{str(given)!r} is the folder of {_plain(folder)}, not of {name}.")
    paths = {split: _find(folder, names) for split, names in _FILES.items()}
    lacking = ["train"] if need_train and paths["train"] is None else []
    lacking += [] if paths["dev"] or paths["test"] else ["dev"]
    if lacking:
        raise DataError(
            f"{name} needs a file {' and a file '.join(lacking)} ({', '.join(SUFFIXES)}); {listing(folder)}."
        )
    return {split: read_conll(path) for split, path in paths.items() if path is not None}


def _plain(folder: Path) -> str:
    """``CoNLL-2003`` and ``wnut_17`` as the tasks are called."""
    return folder.resolve().name.lower().replace("-", "").replace("_", "")


def _find(folder: Path, names: Iterable[str]) -> Path | None:
    there = [folder / (name + ending) for name in names for ending in _ENDINGS if (folder / (name + ending)).is_file()]
    if len(there) > 1:
        raise DataError(f"{str(folder)!r} holds both {there[0].name} and {there[1].name}; leave one.")
    return there[0] if there else None


def from_hub(hub: HubSource) -> dict[str, Loaded]:
    """All splits of a data set of the hub whose columns are known."""
    splits = load_splits(hub.path, hub.config, "give the folder of the task's files with data_dir", hub.revision)
    ours = {"train": hub.train} | {ours: theirs for theirs, ours in hub.evals}
    columns = (hub.texts[0], hub.label)
    return {name: _of_table(split_table(splits, split, hub.path, columns), *columns) for name, split in ours.items()}


def load_source(source: str | Path, splits: Sequence[str], words: Sequence[str], tags: Sequence[str]) -> Loaded:
    """Sentences of a column file, a table, or a data set of the hub.

    Args:
        source: A file, or a hub id, which is looked for only where there is no such file.
        splits: Of a hub data set, the first of these that it has.
        words: Names that the column of words may have, where there are names.
        tags: The same for the tags.

    Raises:
        DataError: It is neither, an unknown format, no such column, or a bad row.
    """
    path, suffix = Path(source), suffix_of(Path(source))
    if suffix in SUFFIXES:
        return read_conll(path)
    if suffix in _TABLES:
        table = read_table(path)
        return _of_table(table, _pick(table.columns, words), _pick(table.columns, tags))
    if path.exists() or not is_hub_id(str(source)):
        raise DataError(
            f"{str(source)!r} is no file of tagged sentences, whose name ends in {', '.join((*SUFFIXES, *_TABLES))}, and "
            f"no hub id of the form 'user/name' or 'user/name:config' ({listing(path.parent)})."
        )
    name, _, config = str(source).partition(":")
    found = load_splits(name, config or None, f"give a file ({', '.join(SUFFIXES)})")
    split = next((split for split in splits if split in found), splits[0])
    there = found[split].column_names if split in found else ()
    columns = _pick(there, words), _pick(there, tags)
    return _of_table(split_table(found, split, str(source), columns), *columns)


def is_table(source: str | Path) -> bool:
    """Whether `load_source` would read it as a file; else it is a hub id, or nothing."""
    return suffix_of(Path(source)) in (*SUFFIXES, *_TABLES)


def _pick(columns: Collection[str], names: Sequence[str]) -> str:
    return next((name for name in names if name in columns), names[0])


def _of_table(table: Table, words: str, tags: str) -> Loaded:
    sentences = [
        _row(table, row, cells) for row, cells in enumerate(zip(table.column(words), table.column(tags), strict=True))
    ]
    kept = [pair for pair in sentences if pair[0]]  # the hub's WNUT17 has a sentence without words
    found, notes = normalised([pair[0] for pair in kept], [pair[1] for pair in kept], table.source)
    empty = len(sentences) - len(kept)
    return found, (*notes, f"{table.source}: {empty} sentences without words are left out") if empty else notes


def _row(table: Table, row: int, cells: tuple[Any, Any]) -> tuple[list[str], list[str]]:
    words, tags = cells
    if not isinstance(words, list) or not isinstance(tags, list) or len(words) != len(tags):
        raise DataError(
            f"{table.where(row)}: there must be a list of words and a list of as many tags; there is {cells!r:.80}."
        )
    for word, tag in zip(words, tags, strict=True):
        if not isinstance(word, str) or not word:
            raise DataError(f"{table.where(row)}: {word!r:.60} is no word.")
        if not is_tag(str(tag)):
            raise DataError(f"{table.where(row)}: the tag {tag!r:.60} is none; tags are O, B-type or I-type, as text.")
    return list(words), list(tags)
