"""Matches the names of two checkpoints, one of which may have a prefix before each name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Renaming:
    """Turns one checkpoint's names into those of another: it takes a prefix off each name that has it, or adds one to each.

    Attributes:
        off: The prefix that is taken off.
        on: The prefix that is added.

    Example:
        >>> Renaming(on="bert.")("pooler.weight"), Renaming(off="bert.")("bert.pooler.weight")
        ('bert.pooler.weight', 'pooler.weight')
    """

    off: str = ""
    on: str = ""

    def __call__(self, name: str) -> str:
        return self.on + name.removeprefix(self.off)


SAME_NAMES = Renaming()


def renaming(names: Collection[str], others: Collection[str], default: Renaming = SAME_NAMES) -> Renaming:
    """Returns the prefix with which the most of a checkpoint's names are names of the other; of equals, the default.

    No two names become one.

    Example:
        >>> renaming(["a.w", "a.b"], ["net.a.w", "net.a.b", "head.w"])
        Renaming(off='', on='net.')
    """
    known, wanted, found = set(names), set(others), Counter({default: 0, SAME_NAMES: 0})
    for other in wanted:
        found.update(Renaming(on=prefix) for prefix, rest in _cuts(other) if rest in known)
    for name in known:
        found.update(Renaming(off=prefix) for prefix, rest in _cuts(name) if prefix and rest in wanted)
    best_first = sorted(found, key=lambda each: (-found[each], each != default, each))
    return next(each for each in best_first if len(set(map(each, known))) == len(known))


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Yields a name in two parts, cut before it and after each of its dots."""
    yield "", name
    for place, sign in enumerate(name, 1):
        if sign == ".":
            yield name[:place], name[place:]
