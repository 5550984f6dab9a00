"""Named entity recognition: CoNLL-2003, WNUT17, and the user's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unmask.errors import DataError
from unmask.lab.tasks.split import hold_out, shared
from unmask.lab.tasks.tables import listed, placed
from unmask.lab.tasks.tags.ner_files import Loaded, from_hub, is_table, load_folder, load_source
from unmask.lab.tasks.tags.tagged import Sentences, TagData, TagSpec
from unmask.lab.tasks.text.data import Examples
from unmask.lab.tasks.text.spec import HubSource

CUSTOM_NER = "ner"  # the name of every task that is made of the user's own files
_HUB_EVALS = ("validation", "test")  # the first that there is
_HELD_OUT = 0.1


def _spec(name: str, hub: str, types: tuple[str, ...], sizes: tuple[int, int, int]) -> TagSpec:
    """A task whose types are in the order of the hub's class ids."""
    # the main branches hold loading scripts, which `datasets` runs no more
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
        name: conll2003 or wnut17; or ner, for a folder of the user's own.
        data_dir: The folder of the column files, named as the data sets name them (``eng.train``, ``emerging.dev.conll``), or
            ``train``, ``dev`` (or ``valid``) and ``test`` with a suffix of ``.conll``, ``.txt``, ``.bio``, ``.iob``,
            ``.iob2``, ``.tsv``; or the folder that holds it. None: the Hugging Face hub.
        need_train: False, to evaluate: let the folder lack the training file, and the training split be empty.
        spec: Of ner: the task, where a delta was trained on it; None: what training shows.

    Returns:
        Evaluation splits ``dev`` and ``test``, or the one that there is. A note says where a split has not the official
        number of sentences.

    Raises:
        DataError: An unknown task, a missing folder or file, a bad line, or an entity type that the task has not.
    """
    if name != CUSTOM_NER and name not in NER:
        raise DataError(
            f"unknown NER task {name!r}; there are {', '.join(sorted(NER))}, and {CUSTOM_NER} for your own."
        )
    known = spec or NER.get(name)
    if data_dir is not None:
        loaded = load_folder(name, Path(data_dir), need_train or known is None, NER)
    elif known is not None and known.hub is not None:
        loaded = from_hub(known.hub)
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
        evaluation: Likewise; None: the hub data set's validation (else test) split, else a tenth of ``train``, of which no
            sentence is trained on.
        words: A table's column of words; None for tokens or words.
        tags: Its column of tags; None for ner_tags or tags.
        seed: Of the held-out tenth.

    Raises:
        DataError: A missing file, an unknown format or column, a bad row, or an entity type that training has not.
    """
    columns = _columns(words, tags)
    loaded = load_source(train, ("train",), *columns)
    with placed(train):
        spec = TagSpec(CUSTOM_NER, loaded[0].types)
    if evaluation is not None or not is_table(train):
        held = load_source(train if evaluation is None else evaluation, _HUB_EVALS, *columns)
        return _task(spec, {"train": loaded, "eval": held})
    with placed(train):
        rest, tenth = _hold_out(loaded[0], seed)
    note = f"no evaluation data given: {len(tenth):,} of {len(loaded[0]):,} sentences are held out (seed {seed})"
    return _task(spec, {"train": (rest, (*loaded[1], note)), "eval": (tenth, ())})


def load_tagged_evaluation(
    spec: TagSpec, path: str | Path, words: str | None = None, tags: str | None = None
) -> TagData:
    """Loads one file (or hub data set) of sentences for a task that is already defined, by a trained delta, say.

    Raises:
        DataError: As `load_tagged`.
    """
    return _task(spec, {"eval": load_source(path, _HUB_EVALS, *_columns(words, tags))})


def _columns(words: str | None, tags: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (words,) if words else ("tokens", "words"), (tags,) if tags else ("ner_tags", "tags")


def _task(spec: TagSpec, loaded: Mapping[str, Loaded]) -> TagData:
    """Puts the splits together, and checks each against the task's types."""
    for split, (sentences, _) in loaded.items():
        unknown = sorted(set(sentences.types) - set(spec.types))
        if unknown:
            shown = " (what training shows)" if spec.name == CUSTOM_NER else ""
            raise DataError(
                f"task {spec.name!r}: the {split} split has entities of type {listed(unknown[:1])!r}; the task's types are "
                f"{listed(spec.types)}{shown}."
            )
    train = loaded["train"][0] if "train" in loaded else Sentences([], [])
    evals = {split: sentences for split, (sentences, _) in loaded.items() if split != "train"}
    notes = [note for _, notes in loaded.values() for note in notes]
    return TagData(spec, train, evals, (*notes, *_overlap(train, evals), *_unofficial(spec, loaded)))


def _as_texts(sentences: Sentences) -> Examples:
    """Sentences as texts, with their rows for labels."""
    return Examples([" ".join(words) for words in sentences.words], None, list(range(len(sentences))))


def _hold_out(sentences: Sentences, seed: int) -> tuple[Sentences, Sentences]:
    rest, held = hold_out(_as_texts(sentences), max(1, round(_HELD_OUT * len(sentences))), seed)
    return sentences.take([int(row) for row in rest.labels]), sentences.take([int(row) for row in held.labels])


def _overlap(train: Sentences, evals: Mapping[str, Sentences]) -> list[str]:
    counts = {split: shared(_as_texts(train), _as_texts(sentences)) for split, sentences in evals.items()}
    return [
        f"{count:,} of {len(evals[split]):,} {split} sentences are in the training data too"
        for split, count in counts.items()
        if count
    ]


def _unofficial(spec: TagSpec, loaded: Mapping[str, Loaded]) -> list[str]:
    """A note where a loaded split is a sample, or another version, of the official one."""
    other = [
        f"{split} has {len(found):,} sentences (official: {spec.sizes[split]:,})"
        for split, (found, _) in loaded.items()
        if split in spec.sizes and len(found) != spec.sizes[split]
    ]
    if not other:
        return []
    return [f"not the official {spec.name} data: {'; '.join(other)}; do not report the score as the official one"]
