"""Finds tied tensors: tensors of a checkpoint that have several names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from unmask.delta.checkpoint import Checkpoint
from unmask.delta.fingerprint import same_bits
from unmask.delta.tensor_file import LazyTensor
from unmask.gradients.entries import bits


def tied_names(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """Returns the names of the tuned checkpoint's tied tensors, each with the one name under which a delta holds the tensor.

    In a module, the names of one parameter are tied. In files, an embedding is tied to each matrix that has its bits, such as
    the output layer's. Names whose tensors differ in the base are not tied. The one name is, if possible, a name in the base,
    the first name in a module, and an embedding's.
    """
    old, aliases = base.tensors, {*base.aliases, *tuned.aliases}

    def rank(name: str) -> tuple[bool, bool, bool, str]:
        return name not in old, name in aliases, not _is_embedding(name), name

    def separate(first: str, name: str) -> bool:
        """Returns True if the base has both names, for two tensors."""
        if first not in old or name not in old:
            return False
        return old[first] is not old[name] if base.is_module else not _is_tied(old[first], old[name])

    found: dict[str, str] = {}
    for group in _groups(tuned):
        first = min(group, key=rank)
        found |= {name: first for name in group if name != first and not separate(first, name)}
    return found


def _groups(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """Yields the names of each tied tensor. No name is in two groups."""
    tensors = checkpoint.tensors
    same: dict[int, list[str]] = defaultdict(list)
    alike: dict[tuple, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        same[id(tensor)].append(name)
        alike[tensor.dtype, tensor.shape].append(name)
    seen: set[str] = set()
    for name in sorted(tensors, key=_is_embedding, reverse=True):
        tensor = tensors[name]
        if name in seen:
            continue
        group = same[id(tensor)]
        if _is_embedding(name) and len(tensor.shape) > 1 and not checkpoint.is_module:
            group = [other for other in alike[tensor.dtype, tensor.shape] if _is_tied(tensor, tensors[other])]
        seen.update(group)
        if len(group) > 1:
            yield group


def _is_tied(left: LazyTensor, right: LazyTensor) -> bool:
    """Returns True if two tensors are one, or have the same bits and are no constant: untrained zeros tie nothing."""
    if left is right:
        return True
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    values = left.read()
    flat = bits(values.contiguous()).reshape(-1)
    return bool((flat != flat[:1]).any()) and same_bits(values, right.read())


def _is_embedding(name: str) -> bool:
    """Returns True if a name's module is called as input embeddings are in transformers.

    Example:
        >>> _is_embedding("model.embed_tokens.weight"), _is_embedding("shared.weight"), _is_embedding("lm_head.weight")
        (True, True, False)
    """
    module = name.split(".")[-2] if "." in name else ""
    return "embed" in module or module in ("wte", "shared")
