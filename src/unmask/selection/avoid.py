"""Finds the weights that a selection must leave alone, because given deltas set them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unmask.delta.base import base_tensors
from unmask.delta.delta import SparseDelta
from unmask.delta.fingerprint import digest, fingerprint
from unmask.errors import MethodError
from unmask.ranking.ledger import Layout


@dataclass(frozen=True)
class Avoided:
    """The weights that some deltas set.

    Attributes:
        entries: The flat indices of single weights by tensor name: (m,) int64, ascending.
        whole: The names of the tensors that a delta stores whole, without single weights of its own in them.
    """

    entries: Mapping[str, Tensor] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()

    def count(self, names: Iterable[str]) -> int:
        """Returns how many single weights of the named tensors are set."""
        return sum(self.entries[name].numel() for name in names if name in self.entries)


def avoided_by(deltas: Any, model: nn.Module) -> Avoided:
    """Returns what deltas set of a model: one delta, several, or None.

    A tensor that a delta stores whole may be missing in this model, or have another shape there: it may be another task's head.

    Raises:
        MethodError: Something else is given, or a delta does not fit the model.
    """
    given = () if deltas is None else (deltas,) if isinstance(deltas, SparseDelta) else deltas
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise MethodError(f"avoid = {deltas!r:.80}; give deltas: [unmask.SparseDelta.load(path)].")
    if not given:
        return Avoided()
    tensors = base_tensors(model)
    parts: dict[str, list[Tensor]] = {}
    whole: set[str] = set()
    for number, delta in enumerate(given):
        if not isinstance(delta, SparseDelta):
            raise MethodError(f"avoid holds {delta!r:.80}; give deltas: [unmask.SparseDelta.load(path)].")
        for name, entry in delta.sparse.items():
            found = None if name not in tensors else tuple(tensors[name].shape)
            if found != entry.shape and name in delta.whole:
                continue
            if found != entry.shape:
                has = "lacks it" if found is None else f"has it with shape {found}"
                raise MethodError(
                    f"avoid: delta number {number} sets weights of {name!r} of shape {entry.shape}, and this model {has}, so "
                    "the delta belongs to another base. Give deltas of this base."
                )
            parts.setdefault(name, []).append(entry.indices.long().cpu())
        whole |= delta.whole.keys() - delta.sparse.keys()
        held = {*delta.sparse, *delta.whole}
        if held and not held & tensors.keys():
            raise MethodError(
                f"avoid: delta number {number} sets {min(held)!r}, and no tensor that this model has, so it belongs to another "
                "base. Give deltas of this base."
            )
    return Avoided({name: torch.cat(flat).unique() for name, flat in parts.items()}, frozenset(whole))


def digest_of_avoided(layout: Layout) -> str | None:
    """Returns a digest of the weights of a layout that may not be selected; None if all may.

    Example:
        >>> digest_of_avoided(Layout(["a"], [torch.zeros(6)])) is None
        True
    """
    flat = {name: layout.avoided(index) for index, name in enumerate(layout.names)}
    digests = {name: digest(each) for name, each in flat.items() if each is not None}
    return fingerprint(digests) if digests else None
