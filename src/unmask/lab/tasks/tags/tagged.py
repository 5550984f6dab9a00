"""Sentences whose words carry tags, and what a task of tagging is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from unmask.errors import DataError
from unmask.lab.tasks.tags.spans import to_iob2, type_of
from unmask.lab.tasks.text.spec import HubSource


@dataclass(frozen=True)
class TagSpec:
    """A task of finding entities.

    Attributes:
        name: E.g. ``"wnut17"``.
        types: The entity types.
        hub: Where the Hugging Face hub keeps it, if it does.
        sizes: Sentences of the official splits, by our name of the split.

    Example:
        >>> TagSpec("t", ("LOC", "PER")).label_names
        ('O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER')
    """

    name: str
    types: tuple[str, ...]
    hub: HubSource | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    main_metric = "f1"

    def __post_init__(self) -> None:
        if not self.types:
            raise DataError(f"task {self.name!r}: there is no entity in the training data; there is nothing to learn.")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The tags in the order of their class ids, as the hub has them."""
        return ("O", *(f"{place}-{kind}" for kind in self.types for place in "BI"))


@dataclass(frozen=True)
class Sentences:
    """Words with tags.

    Attributes:
        words: Of each sentence.
        tags: Of each sentence, IOB2, a tag per word.

    Raises:
        DataError: A sentence has not as many tags as words, or no word.
    """

    words: list[list[str]]
    tags: list[list[str]]

    def __post_init__(self) -> None:
        if len(self.words) != len(self.tags):
            raise DataError(f"there are {len(self.words)} sentences of words and {len(self.tags)} of tags.")
        for number, (words, tags) in enumerate(zip(self.words, self.tags, strict=True), 1):
            if len(words) != len(tags) or not words:
                raise DataError(f"sentence {number} has {len(words)} words and {len(tags)} tags.")

    def __len__(self) -> int:
        return len(self.words)

    @property
    def types(self) -> tuple[str, ...]:
        """The entity types that occur, sorted."""
        found = {type_of(tag) for tags in self.tags for tag in tags}
        return tuple(sorted(kind for kind in found if kind is not None))

    def take(self, rows: Sequence[int]) -> Sentences:
        """The sentences of the given rows, in that order."""
        return Sentences([self.words[row] for row in rows], [self.tags[row] for row in rows])

    def by_length(self) -> Sentences:
        """Those of few words first: batches of like lengths need little padding."""
        return self.take(sorted(range(len(self)), key=lambda row: len(self.words[row])))


@dataclass(frozen=True)
class TagData:
    """A loaded task of tagging.

    Attributes:
        spec: The task.
        train: Its training split; may be empty where only evaluation was asked for.
        evals: Its evaluation splits by name, the main one first.
        notes: What the user should know of the loading.
    """

    spec: TagSpec
    train: Sentences
    evals: Mapping[str, Sentences]
    notes: tuple[str, ...] = ()


def normalised(words: list[list[str]], tags: list[list[str]], source: str) -> tuple[Sentences, tuple[str, ...]]:
    """Sentences in IOB2, and a note where they were not.

    Files in IOB1 have ``B-`` only where two entities of a type touch; in IOB2 every entity begins with ``B-``. A few tags
    ``I-`` that continue nothing, in a file that is IOB2 otherwise, begin an entity, as conlleval reads them.

    Example:
        >>> normalised([["Ann", "ran"]], [["I-PER", "O"]], "a.txt")[1]
        ('a.txt: IOB1, read as IOB2',)
    """
    fixed = [to_iob2(sentence) for sentence in tags]
    changed = _differ(tags, fixed)
    if not changed:
        return Sentences(words, fixed), ()
    iob1 = [_to_iob1(sentence) for sentence in fixed]
    if not _differ(tags, iob1):
        note = f"{source}: IOB1, read as IOB2"
    else:
        note = f"{source}: {changed:,} tags I- continue no entity of their type; each is taken as the beginning of one"
    return Sentences(words, fixed), (note,)


def _to_iob1(tags: Sequence[str]) -> list[str]:
    """Of IOB2: ``B-`` only after an entity of the same type."""
    before = ["O", *tags]
    return [
        f"I-{tag[2:]}" if tag.startswith("B-") and type_of(tag) != type_of(last) else tag
        for last, tag in zip(before, tags, strict=False)
    ]


def _differ(left: Iterable[Sequence[str]], right: Iterable[Sequence[str]]) -> int:
    return sum(a != b for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))
