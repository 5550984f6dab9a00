"""The values that describe a task of tagging words: the task itself, its sentences and its splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unmask.errors import DataError
from unmask.lab.tasks.hub import HubSource
from unmask.lab.tasks.split import Loaded, text_key
from unmask.lab.tasks.tags.spans import to_iob2


@dataclass(frozen=True)
class TagSpec:
    """A task of finding entities.

    Attributes:
        name: The task's name, such as ``"wnut17"``.
        types: The entity types.
        hub: The task's place on the Hugging Face hub, if it has one.
        sizes: The number of sentences of the official splits, by our name of the split.

    Raises:
        DataError: There are no types.

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
        """The tags in the order of their class ids, which is the hub's."""
        return ("O", *(f"{place}-{kind}" for kind in self.types for place in "BI"))


@dataclass(frozen=True)
class Sentences:
    """Words with tags, which can be split as `unmask.lab.tasks.split.Rows`.

    Attributes:
        words: The words of each sentence.
        tags: The tags of each sentence in IOB2, one per word.

    Raises:
        DataError: A sentence has no word, or not as many tags as words.
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
    def keys(self) -> list[str]:
        return [text_key(" ".join(words), "") for words in self.words]

    @property
    def types(self) -> tuple[str, ...]:
        """The entity types that occur, sorted."""
        return tuple(sorted({tag[2:] for tags in self.tags for tag in tags} - {""}))

    def take(self, rows: Sequence[int]) -> Sentences:
        return Sentences([self.words[row] for row in rows], [self.tags[row] for row in rows])

    def by_length(self) -> Sentences:
        """Returns the sentences sorted by length, because batches of similar lengths need little padding."""
        return self.take(sorted(range(len(self)), key=lambda row: len(self.words[row])))


TagData = Loaded[TagSpec, Sentences]
"""A loaded task of tagging."""


def normalised(words: list[list[str]], tags: list[list[str]], source: str) -> tuple[Sentences, tuple[str, ...]]:
    """Converts tags to IOB2, and makes a note if they were not.

    Files in IOB1 have ``B-`` only where two entities of one type touch; in IOB2 every entity begins with ``B-``. If a file in
    IOB2 has a few tags ``I-`` that continue nothing, each of them begins an entity, as conlleval reads them.

    Example:
        >>> normalised([["Ann", "ran"]], [["I-PER", "O"]], "a.txt")[1]
        ('a.txt: IOB1, read as IOB2',)
    """
    fixed = [to_iob2(sentence) for sentence in tags]
    if fixed == tags:
        return Sentences(words, fixed), ()
    iob1 = [  # which has B- only after an entity of the same type
        [
            f"I-{tag[2:]}" if tag.startswith("B-") and tag[2:] != last[2:] else tag
            for last, tag in zip(["O", *sentence], sentence, strict=False)
        ]
        for sentence in fixed
    ]
    if iob1 == tags:
        return Sentences(words, fixed), (f"{source}: IOB1, read as IOB2",)
    stray = sum(a != b for x, y in zip(tags, fixed, strict=True) for a, b in zip(x, y, strict=True))
    note = f"{source}: {stray:,} tags I- continue no entity of their type; each is taken as the beginning of one"
    return Sentences(words, fixed), (note,)
