"""Loads tasks of named entity recognition: CoNLL-2003, WNUT17, and the user's own files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from unmask.errors import DataError
from unmask.lab.tasks.hub import EVALUATION_SPLITS, HubSource, Origin, origin_of, split_table
from unmask.lab.tasks.split import hold_out_a_tenth, shared, unofficial
from unmask.lab.tasks.tables import Table, listed, listing, placed, read_table, suffix_of, task_files
from unmask.lab.tasks.tags.conll import SUFFIXES, read_conll
from unmask.lab.tasks.tags.spans import is_tag
from unmask.lab.tasks.tags.spec import Sentences, TagData, TagSpec, normalised

CUSTOM_NER = "ner"
"""The name of every task that is made of the user's own files."""
_Split = tuple[Sentences, tuple[str, ...]]  # the sentences of a split, and notes
_TABLES = (".jsonl", ".json", ".parquet")  # the formats of tables whose cells can hold lists
_FORMATS = (*SUFFIXES, *_TABLES)

# The names of a split's file, without the suffix. The data sets' own names come first.
_FILES: Mapping[str, tuple[str, ...]] = {
    "train": ("eng.train", "wnut17train", "train"),
    "dev": ("eng.testa", "emerging.dev", "dev", "valid", "validation", "testa"),
    "test": ("eng.testb", "emerging.test.annotated", "emerging.test", "test", "testb"),
}


def _spec(name: str, hub: str, types: tuple[str, ...], sizes: tuple[int, int, int]) -> TagSpec:
    """Makes a task whose types are in the order of the hub's class ids."""
    # The main branches hold loading scripts, which `datasets` no longer runs.
    evals, branch = (("validation", "dev"), ("test", "test")), "refs/convert/parquet"
    source = HubSource(hub, None, ("tokens",), "ner_tags", evals=evals, revision=branch)
    return TagSpec(name, types, source, dict(zip(("train", "dev", "test"), sizes, strict=True)))


NER: Mapping[str, TagSpec] = {
    spec.name: spec
    for spec in (
        _spec("conll2003", "eriktks/conll2003", ("PER", "ORG", "LOC", "MISC"), (14_041, 3_250, 3_453)),
        _spec(
            "wnut17",
            "leondz/wnut_17",
            ("corporation", "creative-work", "group", "location", "person", "product"),
            (3_394, 1_009, 1_287),
        ),
    )
}


def load_ner(
    name: str, data_dir: str | Path | None = None, *, need_train: bool = True, spec: TagSpec | None = None
) -> TagData:
    """Loads a task's training, development and test splits.

    Args:
        name: The task: conll2003 or wnut17, or ner for a folder of the user's own.
        data_dir: The folder of the column files, or the folder that holds it. The files have the data sets' own names
            (``eng.train``, ``emerging.dev.conll``), or are ``train``, ``dev`` (or ``valid``) and ``test`` with a suffix of
            `load_tagged`. None means the Hugging Face hub.
        need_train: False is for evaluation: the folder may lack the training file, and the training split is then empty.
        spec: The task ner of a trained delta; None takes the entity types that training shows.

    Returns:
        The task, with the evaluation splits ``dev`` and ``test``, or the one that there is. A note says if a split has not
        the official number of sentences.

    Raises:
        DataError: The task is unknown, a folder or file is missing, a line is bad, or the task lacks an entity type.
    """
    if name != CUSTOM_NER and name not in NER:
        raise DataError(
            f"unknown NER task {name!r}; there are {', '.join(sorted(NER))}, and {CUSTOM_NER} for your own."
        )
    known = spec or NER.get(name)
    if data_dir is not None:
        folder, paths = task_files(Path(data_dir), name, NER, _FILES, ("", *SUFFIXES))
        lacking = ["train"] if (need_train or known is None) and "train" not in paths else []
        lacking += [] if paths.keys() - {"train"} else ["dev"]
        if lacking:
            raise DataError(
                f"{name} needs a file {' and a file '.join(lacking)} ({', '.join(SUFFIXES)}); {listing(folder)}."
            )
        loaded = {split: read_conll(path) for split, path in paths.items()}
    elif known is not None and known.hub is not None:
        columns = (known.hub.texts[0], known.hub.label)
        loaded = {split: _of_table(table, *columns) for split, table in known.hub.tables().items()}
    else:
        raise DataError(f"task {name!r} is your own: give the folder of its files with data_dir, or a file with data.")
    return _task(known or TagSpec(CUSTOM_NER, loaded["train"][0].types), loaded)


def load_tagged(
    train: str | Path,
    evaluation: str | Path | None,
    words: str | None = None,
    tags: str | None = None,
    *,
    seed: int = 0,
) -> TagData:
    """Loads a task from the user's own files, or from a data set of the Hugging Face hub.

    Args:
        train: A column file (``.conll``, ``.txt``, ``.bio``, ``.iob``, ``.iob2``, ``.tsv``), a table (jsonl, json, parquet)
            whose rows hold a list of words and a list of tags, or a hub id (``"user/name"``, ``"user/name:config"``).
        evaluation: A file or hub id likewise. None means the hub data set's validation (else test) split if it has one.
            Otherwise a tenth of ``train`` is held out, and none of its sentences is trained on.
        words: A table's column of words; None for tokens or words.
        tags: A table's column of tags; None for ner_tags or tags.
        seed: The seed of the held-out tenth.

    Raises:
        DataError: A file is missing, a format or column is unknown, a row is bad, or training lacks an entity type of the
            evaluation data.
    """
    columns, origin = _columns(words, tags), origin_of(train, _FORMATS)
    sentences, notes = _read(origin, ("train",), *columns)
    with placed(train):
        spec = TagSpec(CUSTOM_NER, sentences.types)
        if evaluation is None and not origin.evaluates:
            rest, tenth, note = hold_out_a_tenth(sentences, "sentences", seed)
            return _task(spec, {"train": (rest, (*notes, note)), "eval": (tenth, ())})
    held = origin if evaluation is None else origin_of(evaluation, _FORMATS)
    return _task(spec, {"train": (sentences, notes), "eval": _read(held, EVALUATION_SPLITS, *columns)})


def load_tagged_evaluation(
    spec: TagSpec, path: str | Path, words: str | None = None, tags: str | None = None
) -> TagData:
    """Loads one file (or hub data set) of sentences for a task that is already defined, for instance by a trained delta.

    Raises:
        DataError: The reasons are those of `load_tagged`.
    """
    return _task(spec, {"eval": _read(origin_of(path, _FORMATS), EVALUATION_SPLITS, *_columns(words, tags))})


def _columns(words: str | None, tags: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names that the columns of words and tags may have."""
    return (words,) if words else ("tokens", "words"), (tags,) if tags else ("ner_tags", "tags")


def _task(spec: TagSpec, loaded: Mapping[str, _Split]) -> TagData:
    """Puts the splits together, and checks each against the task's types."""
    for split, (sentences, _) in loaded.items():
        unknown = sorted(set(sentences.types) - set(spec.types))
        if unknown:
            origin = " (what training shows)" if spec.name == CUSTOM_NER else ""
            raise DataError(
                f"task {spec.name!r}: the {split} split has entities of type {listed(unknown[:1])!r}; the task's types are "
                f"{listed(spec.types)}{origin}."
            )
    train = loaded["train"][0] if "train" in loaded else Sentences([], [])
    evals = {split: sentences for split, (sentences, _) in loaded.items() if split != "train"}
    notes = [note for _, notes in loaded.values() for note in notes]
    for split, sentences in evals.items():
        count = shared(train.keys, sentences.keys)
        if count:
            notes.append(f"{count:,} of {len(sentences):,} {split} sentences are in the training data too")
    notes += unofficial(spec.name, "sentences", {"train": train, **evals}, spec.sizes)
    return TagData(spec, train, evals, tuple(notes))


def _read(origin: Origin, splits: Sequence[str], words: Sequence[str], tags: Sequence[str]) -> _Split:
    """Reads sentences from a column file, a table with such columns, or the first of these splits that a hub data set has."""
    if origin.splits is not None:
        split = origin.first_of(splits)
        there = origin.splits[split].column_names if split in origin.splits else ()
        columns = _pick(there, words), _pick(there, tags)
        return _of_table(split_table(origin.splits, split, origin.name, columns), *columns)
    path, suffix = Path(origin.name), suffix_of(Path(origin.name))
    if suffix in SUFFIXES:
        return read_conll(path)
    if suffix not in _TABLES:
        raise DataError(
            f"{origin.name!r} is not a file of tagged sentences; the name of one ends in {', '.join(_FORMATS)}."
        )
    table = read_table(path)
    return _of_table(table, _pick(table.columns, words), _pick(table.columns, tags))


def _pick(columns: Collection[str], names: Sequence[str]) -> str:
    return next((name for name in names if name in columns), names[0])


def _of_table(table: Table, words: str, tags: str) -> _Split:
    kept_words: list[list[str]] = []
    kept_tags: list[list[str]] = []
    for row, cells in enumerate(zip(table.column(words), table.column(tags), strict=True)):
        if not isinstance(cells[0], list) or not isinstance(cells[1], list) or len(cells[0]) != len(cells[1]):
            raise DataError(
                f"{table.where(row)}: there must be a list of words and a list of as many tags; there is {cells!r:.80}."
            )
        for word, tag in zip(*cells, strict=True):
            if not isinstance(word, str) or not word:
                raise DataError(f"{table.where(row)}: {word!r:.60} is not a word.")
            if not is_tag(str(tag)):
                raise DataError(f"{table.where(row)}: {tag!r:.60} is not a tag; tags are O, B-type or I-type, as text.")
        if cells[0]:  # the hub's WNUT17 has a sentence without words
            kept_words.append(list(cells[0]))
            kept_tags.append(list(cells[1]))
    found, notes = normalised(kept_words, kept_tags, table.source)
    empty = len(table) - len(found)
    return found, (*notes, f"{table.source}: {empty} sentences without words are left out") if empty else notes
