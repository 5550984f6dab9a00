"""Finds entities in IOB tags, and scores them as the CoNLL shared tasks do (Tjong Kim Sang & De Meulder, 2003)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unmask.errors import DataError

Span = tuple[str, int, int]  # entity type, first word, one past the last word
Tags = Sequence[str]  # the tags of one sentence
_TAG = re.compile(r"O|[BI]-\S.*")  # The entity type of a tag is tag[2:], which is empty for O.


def is_tag(text: str) -> bool:
    """Returns True if a text is an IOB tag: ``O``, ``B-type`` or ``I-type``.

    Example:
        >>> [is_tag(text) for text in ("O", "B-creative-work", "I-", "E-LOC", "LOC")]
        [True, True, False, False, False]
    """
    return _TAG.fullmatch(text) is not None


def starts(tags: Tags, strict: bool = False) -> list[bool]:
    """Returns, for each word, True if an entity begins there.

    If ``strict``, only ``B-`` begins an entity. Else ``I-`` after another type or outside an entity begins one too. This is
    conlleval's rule, by which both IOB1 and IOB2 are read correctly.

    Example:
        >>> starts(["I-PER", "I-PER", "B-PER", "I-LOC", "O"])
        [True, False, True, True, False]
    """
    return [
        tag.startswith("B-") or (not strict and tag != "O" and tag[2:] != last[2:])
        for last, tag in zip(["O", *tags], tags, strict=False)
    ]


def spans(tags: Tags, strict: bool = False) -> list[Span]:
    """Finds the entities of a sentence, in order.

    ``strict`` is that of `starts`: an ``I-`` that continues no entity of its type then belongs to none.

    Example:
        >>> spans(["B-PER", "I-PER", "I-LOC", "O"])
        [('PER', 0, 2), ('LOC', 2, 3)]
        >>> spans(["B-PER", "I-PER", "I-LOC", "O"], strict=True)
        [('PER', 0, 2)]
    """
    found: list[Span] = []
    kind, first = "", 0  # the type and the first word of the entity that is open; no type if none is
    closed = [*tags, "O"]  # so that the last entity ends
    for word, (tag, begins) in enumerate(zip(closed, starts(closed, strict), strict=True)):
        if kind and (begins or tag[2:] != kind):
            found.append((kind, first, word))
            kind = ""
        if begins:
            kind, first = tag[2:], word
    return found


def to_iob2(tags: Tags) -> list[str]:
    """Converts tags to IOB2, in which each entity begins with ``B-``.

    The tags may be IOB1, or IOB2 in which some ``I-`` continue no entity.

    Example:
        >>> to_iob2(["I-PER", "I-PER", "B-PER", "O", "I-LOC"])
        ['B-PER', 'I-PER', 'B-PER', 'O', 'B-LOC']
    """
    return [f"B-{tag[2:]}" if begins else tag for tag, begins in zip(tags, starts(tags), strict=True)]


METRICS = ("f1", "precision", "recall", "accuracy")
"""The names of the metrics that `score` returns."""


def score(gold: Sequence[Tags], guess: Sequence[Tags], strict: bool = False) -> dict[str, float]:
    """Computes the micro-averaged precision, recall and F1 of entities, and the accuracy of tags.

    An entity is found if its type and both its ends are right. An undefined metric (no entities to find, or none found) is 0.

    Args:
        gold: The right tags of every sentence.
        guess: The predicted tags of every sentence.
        strict: The rule by which entities are read on both sides (see `spans`).

    Returns:
        The values of ``f1``, ``precision``, ``recall`` and ``accuracy``, as fractions.

    Raises:
        DataError: The two sides differ in length, or there is no word.

    Example:
        >>> score([["B-PER", "I-PER", "O"]], [["B-PER", "O", "B-LOC"]])
        {'f1': 0.0, 'precision': 0.0, 'recall': 0.0, 'accuracy': 0.3333333333333333}
    """
    if len(gold) != len(guess):
        raise DataError(
            f"{len(gold):,} sentences of tags and {len(guess):,} of predictions; the numbers must be equal."
        )
    if not any(gold):
        raise DataError("there is no word to score.")
    for number, (right, predicted) in enumerate(zip(gold, guess, strict=True), 1):
        if len(right) != len(predicted):
            raise DataError(f"sentence {number} has {len(right)} tags and {len(predicted)} predictions.")

    def entities(sentences: Sequence[Tags]) -> set[tuple[int, Span]]:
        return {(number, span) for number, tags in enumerate(sentences) for span in spans(tags, strict)}

    def share(part: int, whole: int) -> float:
        return part / whole if whole else 0.0

    wanted, found = entities(gold), entities(guess)
    both = len(wanted & found)
    same = sum(a == b for left, right in zip(gold, guess, strict=True) for a, b in zip(left, right, strict=True))
    return {
        "f1": share(2 * both, len(wanted) + len(found)),
        "precision": share(both, len(found)),
        "recall": share(both, len(wanted)),
        "accuracy": share(same, sum(map(len, gold))),
    }
