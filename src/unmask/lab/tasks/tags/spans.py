"""Entities in IOB tags, and their F1, as the CoNLL shared tasks score them (Tjong Kim Sang & De Meulder, 2003)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from unmask.errors import DataError

Span = tuple[str, int, int]  # entity type, first word, one past the last word
Tags = Sequence[str]  # of one sentence
_TAG = re.compile(r"O|[BI]-\S.*")
_OUTSIDE = "O"


def is_tag(text: str) -> bool:
    """Whether a text is an IOB tag: ``O``, ``B-type`` or ``I-type``.

    Example:
        >>> [is_tag(text) for text in ("O", "B-creative-work", "I-", "E-LOC", "LOC")]
        [True, True, False, False, False]
    """
    return _TAG.fullmatch(text) is not None


def type_of(tag: str) -> str | None:
    """The entity type of a tag; None outside entities.

    Example:
        >>> type_of("I-creative-work"), type_of("O")
        ('creative-work', None)
    """
    return None if tag == _OUTSIDE else tag[2:]


def starts(tags: Tags, strict: bool = False) -> list[bool]:
    """For each word, whether an entity begins there.

    Args:
        tags: The sentence's tags.
        strict: Only ``B-`` begins one. Otherwise also ``I-`` after another type or outside, as conlleval has it, so that
            IOB1 and IOB2 are both read rightly.

    Example:
        >>> starts(["I-PER", "I-PER", "B-PER", "I-LOC", "O"])
        [True, False, True, True, False]
    """
    before = [_OUTSIDE, *tags]
    return [
        tag.startswith("B-") or (not strict and tag != _OUTSIDE and type_of(tag) != type_of(last))
        for last, tag in zip(before, tags, strict=False)
    ]


def spans(tags: Tags, strict: bool = False) -> list[Span]:
    """The entities of a sentence, in order.

    Args:
        tags: Its tags.
        strict: An ``I-`` that continues no entity of its type is none. Otherwise it begins one, as conlleval has it.

    Example:
        >>> spans(["B-PER", "I-PER", "I-LOC", "O"])
        [('PER', 0, 2), ('LOC', 2, 3)]
        >>> spans(["B-PER", "I-PER", "I-LOC", "O"], strict=True)
        [('PER', 0, 2)]
    """
    return list(_spans(tags, strict))


def _spans(tags: Tags, strict: bool) -> Iterator[Span]:
    kind, first = None, 0  # of the entity that is open
    for word, (tag, begins) in enumerate(zip(tags, starts(tags, strict), strict=True)):
        if kind is not None and (begins or type_of(tag) != kind):
            yield kind, first, word
            kind = None
        if begins:
            kind, first = type_of(tag), word
    if kind is not None:
        yield kind, first, len(tags)


def to_iob2(tags: Tags) -> list[str]:
    """The same entities with ``B-`` on the first word of each: of IOB1, or of IOB2 with tags that continue nothing.

    Example:
        >>> to_iob2(["I-PER", "I-PER", "B-PER", "O", "I-LOC"])
        ['B-PER', 'I-PER', 'B-PER', 'O', 'B-LOC']
    """
    return [f"B-{tag[2:]}" if begins else tag for tag, begins in zip(tags, starts(tags), strict=True)]


METRICS = ("f1", "precision", "recall", "accuracy")  # of `score`


def score(gold: Sequence[Tags], guess: Sequence[Tags], strict: bool = False) -> dict[str, float]:
    """Precision, recall and F1 of entities, micro-averaged, and the accuracy of tags.

    An entity is found if its type and both its ends are right. What is undefined (no entities to find, or none found) is 0.

    Args:
        gold: The right tags of every sentence.
        guess: The predicted ones.
        strict: As for `spans`, on both sides.

    Returns:
        ``f1``, ``precision``, ``recall``, ``accuracy``, as fractions.

    Raises:
        DataError: They are not of the same lengths, or there is no word.

    Example:
        >>> score([["B-PER", "I-PER", "O"]], [["B-PER", "O", "B-LOC"]])
        {'f1': 0.0, 'precision': 0.0, 'recall': 0.0, 'accuracy': 0.3333333333333333}
    """
    _check(gold, guess)
    wanted, found = (_entities(sentences, strict) for sentences in (gold, guess))
    both = len(wanted & found)
    precision, recall = _share(both, len(found)), _share(both, len(wanted))
    same = sum(a == b for left, right in zip(gold, guess, strict=True) for a, b in zip(left, right, strict=True))
    return {
        "f1": _share(2 * both, len(wanted) + len(found)),
        "precision": precision,
        "recall": recall,
        "accuracy": _share(same, sum(map(len, gold))),
    }


def _entities(sentences: Iterable[Tags], strict: bool) -> set[tuple[int, Span]]:
    return {(number, span) for number, tags in enumerate(sentences) for span in spans(tags, strict)}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _check(gold: Sequence[Tags], guess: Sequence[Tags]) -> None:
    if len(gold) != len(guess):
        raise DataError(f"{len(gold):,} sentences of tags and {len(guess):,} of predictions; there must be as many.")
    if not any(gold):
        raise DataError("there is no word to score.")
    for number, (right, predicted) in enumerate(zip(gold, guess, strict=True), 1):
        if len(right) != len(predicted):
            raise DataError(f"sentence {number} has {len(right)} tags and {len(predicted)} predictions.")
