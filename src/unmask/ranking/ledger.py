"""Where every slot's scalar weight lives: positions, tensors, flat indices.

A *position* numbers the scalar weights of all eligible tensors, concatenated in name order; a *slot* numbers the entries
of the trainable vector ``values``. Both tables cost O(B), whatever the size of the model; where weights that leave are kept
(`unmask.Method.leaving`) there are as many slots as weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from unmask.gradients.entries import Entries, put, take


class Layout:
    """The eligible tensors in name order, and the position of each one's first scalar weight."""

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self.names = list(names)
        self.tensors = list(tensors)
        sizes = torch.tensor([0] + [t.numel() for t in self.tensors], dtype=torch.int64)
        self.bounds = sizes.cumsum(0)  # (tensors + 1,)
        self.starts: list[int] = self.bounds[:-1].tolist()
        self.total = int(self.bounds[-1])
        self.versions = [-1] * len(
            self.tensors
        )  # each tensor's version after our own last write; see unmask.selection.identity

    def plain(self, index: int) -> Tensor:
        """The tensor without gradient tracking: shares storage and version counter with the parameter."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.tensors[index].detach()

    def split(self, positions: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Groups positions by tensor: yields (tensor, flat indices ascending, their places in ``positions``)."""
        if not positions.numel():
            return
        order = positions.argsort()
        ordered = positions[order]
        edges = torch.searchsorted(ordered, self.bounds.to(ordered.device)).tolist()
        for index, (low, high) in enumerate(pairwise(edges)):
            if low < high:
                yield index, ordered[low:high] - self.starts[index], order[low:high]

    def at(self, index: int, flat: Tensor, slots: Tensor) -> Entries:
        """A tensor's entries at ascending flat indices."""
        tensor = self.tensors[index]
        rows = tensor.shape[0] if tensor.ndim > 1 else 1
        return Entries((rows, tensor.numel() // rows if rows else 0), flat.to(tensor.device), slots)

    def entries(self, positions: Tensor) -> Iterator[tuple[int, Entries]]:
        """Groups positions by tensor; an entry's slot is its place in ``positions``."""
        for index, flat, places in self.split(positions):
            yield index, self.at(index, flat, places)

    def read(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The current weights at positions, in ``dtype``."""
        values = torch.empty(positions.shape, dtype=dtype, device=positions.device)
        for index, flat, places in self.split(positions):
            values[places] = take(self.plain(index), flat).to(values.device, dtype)
        return values

    def write(self, positions: Tensor, values: Tensor) -> None:
        """Sets the weights at positions (cast to each tensor's dtype)."""
        for index, flat, places in self.split(positions):
            self.put(index, flat, values[places])

    def put(self, index: int, flat: Tensor, values: Tensor) -> None:
        """Sets one tensor's weights at flat indices (cast to its dtype)."""
        tensor = self.plain(index)
        ours = not tensor.is_inference() and tensor._version == self.versions[index]
        put(tensor, flat, values)
        if ours:
            self.versions[index] = tensor._version

    def holds(self, parameter: Tensor) -> bool:
        """Whether the model has this parameter in a tensor's place."""
        return False


class SlotTable:
    """Which position each slot holds, and the base value it started from.

    Attributes:
        layout: The eligible tensors.
        budget: B, of which an allocation gives each tensor, row or column its share.
        positions: (B,) int64, or (slots,) where there are more; -1 for a slot that holds nothing yet.
        base: The weight at that position before any training, of ``positions``' shape.
        held: The first slot that holds nothing, nor does any after it.
    """

    def __init__(
        self, layout: Layout, budget: int, dtype: torch.dtype, device: torch.device, slots: int | None = None
    ) -> None:
        self.layout, self.budget = layout, budget
        slots = budget if slots is None else slots
        self.positions = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self.base = torch.zeros(slots, dtype=dtype, device=device)
        self.held = 0
        self._members: dict[int, Entries] = {}

    def members(self, index: int) -> Entries | None:
        """One tensor's entries that hold a slot; None if it has none."""
        return self._members.get(index)

    def entries(self, slots: Tensor) -> dict[int, Entries]:
        """The entries of some slots, all of them held, by tensor index."""
        positions = self.positions[slots]
        return {
            index: self.layout.at(index, flat, slots[places]) for index, flat, places in self.layout.split(positions)
        }

    def find(self, positions: Tensor) -> Tensor:
        """The slot that holds each position: (n,) int64, -1 where none does."""
        slots = torch.full_like(positions, -1)
        for index, flat, places in self.layout.split(positions):
            members = self._members.get(index)
            if members is not None:
                own = members.flat.to(flat.device)
                at = torch.searchsorted(own, flat).clamp_(max=own.numel() - 1)
                slots[places] = torch.where(own[at] == flat, members.slots.to(flat.device)[at], -1)
        return slots

    def occupied(self) -> list[int]:
        """Tensors that have at least one slot."""
        return sorted(self._members)

    def assign(self, slots: Tensor, positions: Tensor, base: Tensor) -> None:
        """Gives slots to positions (and takes them from whatever they held)."""
        vacant = bool((self.positions[slots] < 0).all())
        self.positions[slots] = positions
        self.base[slots] = base
        if vacant and slots.numel():
            self.held = max(self.held, int(slots.max().item()) + 1)
            for index, flat, places in self.layout.split(positions):
                self._insert(index, flat, slots[places])
        elif slots.numel():
            self.rebuild()

    def load(self, positions: Tensor, base: Tensor) -> None:
        """Replaces the whole table; slots beyond the given ones hold nothing."""
        self.positions.fill_(-1)
        self.positions[: positions.numel()] = positions
        self.base.zero_()
        self.base[: base.numel()] = base
        self.rebuild()

    def scatter(self, values: Tensor, active: int) -> None:
        """Writes the values of the first ``active`` slots into the tensors."""
        members = list(self._members.items())
        if active < self.held:
            members = [(index, entries.below(active)) for index, entries in members]
        if not members:
            return
        gathered = values.detach()[torch.cat([entries.slots for _, entries in members])]  # one gather for all tensors
        parts = gathered.split([entries.slots.numel() for _, entries in members])
        for (index, entries), part in zip(members, parts, strict=True):
            self.layout.put(index, entries.flat, part)

    @torch.no_grad()
    def zero_rest(self) -> None:
        """Sets every weight of the layout that holds no slot to zero."""
        for index in range(len(self.layout.tensors)):
            tensor, entries = self.layout.plain(index), self._members.get(index)
            kept = None if entries is None else take(tensor, entries.flat)
            tensor.zero_()
            if entries is not None and kept is not None:
                put(tensor, entries.flat, kept)

    def rebuild(self) -> None:
        """Groups the held slots by tensor, on each tensor's device."""
        held = (self.positions >= 0).nonzero().squeeze(1)
        self._members, self.held = {}, int(held[-1].item()) + 1 if held.numel() else 0
        for index, flat, places in self.layout.split(self.positions[held]):
            self._insert(index, flat, held[places])

    def _insert(self, index: int, flat: Tensor, slots: Tensor) -> None:
        """Adds a tensor's new entries, flat indices ascending, in linear time."""
        tensor = self.layout.tensors[index]
        flat, old = flat.to(tensor.device), self._members.get(index)
        if old is not None:
            at = torch.searchsorted(old.flat, flat) + torch.arange(flat.numel(), device=flat.device)
            flat, slots = _merged(old.flat, flat, at), _merged(old.slots, slots, at.to(slots.device))
        self._members[index] = self.layout.at(index, flat, slots)


def _merged(old: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """``new`` at the places ``at`` of the result, ``old`` in order at the others."""
    merged = old.new_empty(old.numel() + new.numel())
    rest = torch.ones(merged.numel(), dtype=torch.bool, device=old.device)
    rest[at] = False
    merged[rest] = old
    merged[at] = new
    return merged
