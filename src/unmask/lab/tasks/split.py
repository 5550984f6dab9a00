"""Holding out part of the training data, and finding texts that stand on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from unmask.errors import DataError
from unmask.lab.tasks.text.data import Examples


def hold_out(examples: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    """Splits examples so that no text (up to case and blanks) stands on both sides.

    The choice goes by the SHA-256 of seed and text, so it depends neither on the order of the rows nor on a random
    generator's version. Both sides keep the given order.

    Args:
        examples: What to split.
        count: How many to hold out; fewer where only larger groups of equal texts are left.
        seed: Another seed, another choice.

    Returns:
        The examples to train on, and those held out.

    Raises:
        DataError: One side would be empty.

    Example:
        >>> train, held = hold_out(Examples(["a", "b", "A ", "c"], None, [0, 1, 0, 1]), 1, seed=0)
        >>> len(train), len(held)
        (3, 1)
    """
    held = held_rows(_keys(examples), count, seed)
    return examples.take([row for row in range(len(examples)) if row not in held]), examples.take(sorted(held))


def held_rows(keys: Sequence[str], count: int, seed: int) -> set[int]:
    """The rows that `hold_out` holds out, of rows known by their texts: rows of equal text stay together.

    Raises:
        DataError: One side would be empty.

    Example:
        >>> held_rows(["a", "b", "a", "c"], 1, seed=0)
        {1}
    """
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    held: set[int] = set()
    for key in sorted(groups, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest()):
        if len(held) + len(groups[key]) <= count:
            held.update(groups[key])
    if not held or len(held) == len(keys):
        raise DataError(
            f"{len(keys)} examples with {len(groups)} distinct texts cannot be split into training and evaluation "
            "data; give an evaluation file."
        )
    return held


def shared(train: Examples, evaluation: Examples) -> int:
    """How many evaluation examples have a text (or pair) that is also in the training data, up to case and blanks."""
    known = set(_keys(train))
    return sum(key in known for key in _keys(evaluation))


def _keys(examples: Examples) -> list[str]:
    pairs = examples.pairs if examples.pairs is not None else [""] * len(examples)
    return ["\n".join(map(text_key, both)) for both in zip(examples.texts, pairs, strict=True)]


def text_key(text: str) -> str:
    """What two texts share that are equal up to case and blanks.

    Example:
        >>> text_key("  A b\\n")
        'a b'
    """
    return " ".join(text.lower().split())
