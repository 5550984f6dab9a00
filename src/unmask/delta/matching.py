"""Matches the tensors of two checkpoints: by names that differ in a prefix, and by tensors that have several names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from unmask.delta.fingerprint import same_bits
from unmask.delta.tensor_file import LazyTensor

LazyTensors = Mapping[str, LazyTensor]


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

    Example:
        >>> renaming(["a.w", "a.b"], ["net.a.w", "net.a.b", "head.w"])
        Renaming(off='', on='net.')
    """
    known, wanted, found = set(names), set(others), Counter({default: 0})
    for other in wanted:
        found.update(Renaming(on=prefix) for prefix, rest in _cuts(other) if rest in known)
    for name in known:
        found.update(Renaming(off=prefix) for prefix, rest in _cuts(name) if prefix and rest in wanted)
    return min(found, key=lambda each: (-found[each], each != default, each))


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Yields a name in two parts, cut before it and after each of its dots."""
    yield "", name
    for place, sign in enumerate(name, 1):
        if sign == ".":
            yield name[:place], name[place:]


def tied_names(tuned: LazyTensors, base: LazyTensors, last: Collection[str] = ()) -> dict[str, str]:
    """Returns the names of tied tensors of a tuned checkpoint, each with the one name under which a delta holds the tensor.

    Names are tied that belong to one tensor of a module. In files, an embedding and a matrix with its bits are tied (such as
    the output layer's). Names whose tensors differ in the base are not tied. The one name is rather a name that the base has,
    none of ``last``, and an embedding's.
    """

    def rank(name: str) -> tuple[bool, bool, bool, str]:
        return name not in base, name in last, not _is_embedding(name), name

    found: dict[str, str] = {}
    for group in _groups(tuned):
        first = min(group, key=rank)
        both = [name for name in group if name in base] if first in base else []
        apart = {name for name in both if not _tied(base[first], base[name])}
        found |= {name: first for name in group if name != first and name not in apart and name not in found}
    return found


def _groups(tensors: LazyTensors) -> Iterator[list[str]]:
    """Yields the names that one tensor has, if it has several."""
    by_tensor, by_form = defaultdict(list), defaultdict(list)
    for name, tensor in tensors.items():
        by_tensor[id(tensor)].append(name)
        by_form[tensor.dtype, tensor.shape].append(name)
    yield from (names for names in by_tensor.values() if len(names) > 1)
    seen: set[str] = set()
    for name in filter(_is_embedding, tensors):
        tensor = tensors[name]
        others = [other for other in by_form[tensor.dtype, tensor.shape] if tensors[other] is not tensor]
        if name not in seen and len(tensor.shape) > 1 and others:
            group = [name, *(other for other in others if _tied(tensor, tensors[other]))]
            seen.update(group)
            if len(group) > 1:
                yield group


def _tied(left: LazyTensor, right: LazyTensor) -> bool:
    """Returns True if two tensors are one, or have the same bits; a constant (an untrained matrix of zeros) ties nothing."""
    if left is right:
        return True
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    values = left.read()
    return same_bits(values, right.read()) and not bool((values == values.reshape(-1)[:1]).all())


def _is_embedding(name: str) -> bool:
    """Returns True if a name's module is called as input embeddings are in transformers.

    Example:
        >>> _is_embedding("model.embed_tokens.weight"), _is_embedding("shared.weight"), _is_embedding("lm_head.weight")
        (True, True, False)
    """
    module = name.split(".")[-2] if "." in name else ""
    return "embed" in module or module in ("wte", "shared")
