"""Where every slot's scalar weight lives: positions, tensors, flat indices.

A *position* numbers the scalar weights of all eligible tensors, concatenated in name order; a *slot* numbers the entries
of the trainable vector ``values``. Both tables cost O(B), whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def take(tensor: Tensor, flat: Tensor) -> Tensor:
    """Entries of a tensor at flat (row-major) indices, without copying a non-contiguous tensor.

    Example:
        >>> take(torch.arange(6).view(2, 3).t(), torch.tensor([1, 2])).tolist()
        [3, 1]
    """
    flat = flat.to(tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[flat]
    return tensor[torch.unravel_index(flat, tensor.shape)]


def put(tensor: Tensor, flat: Tensor, values: Tensor) -> None:
    """Writes values (cast to the tensor's dtype) at flat (row-major) indices, in place."""
    flat, values = flat.to(tensor.device), values.to(tensor.device, tensor.dtype)
    if tensor.is_contiguous():
        tensor.view(-1)[flat] = values
    else:
        tensor[torch.unravel_index(flat, tensor.shape)] = values


class Layout:
    """The eligible tensors in name order, and the position of each one's first scalar weight."""

    def __init__(self, names: Sequence[str], tensors: Sequence[nn.Parameter]) -> None:
        self.names = list(names)
        self.tensors = list(tensors)
        sizes = torch.tensor([0] + [t.numel() for t in self.tensors], dtype=torch.int64)
        self.bounds = sizes.cumsum(0)  # (tensors + 1,)
        self.starts: list[int] = self.bounds[:-1].tolist()
        self.total = int(self.bounds[-1])

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

    def read(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The current weights at positions, in ``dtype``."""
        values = torch.empty(positions.shape, dtype=dtype, device=positions.device)
        for index, flat, places in self.split(positions):
            values[places] = take(self.plain(index), flat).to(values.device, dtype)
        return values

    def write(self, positions: Tensor, values: Tensor) -> None:
        """Sets the weights at positions (cast to each tensor's dtype)."""
        for index, flat, places in self.split(positions):
            put(self.plain(index), flat, values[places])


class SlotTable:
    """Which position each slot holds, and the base value it started from.

    Attributes:
        layout: The eligible tensors.
        positions: (B,) int64; -1 for a slot that holds nothing yet.
        base: (B,) the weight at that position before any training.
    """

    def __init__(self, layout: Layout, budget: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.positions = torch.full((budget,), -1, dtype=torch.int64, device=device)
        self.base = torch.zeros(budget, dtype=dtype, device=device)
        self._members: dict[int, tuple[Tensor, Tensor]] = {}

    def members(self, index: int) -> tuple[Tensor, Tensor] | None:
        """(flat indices ascending, their slots) of one tensor; None if it has none."""
        return self._members.get(index)

    def occupied(self) -> list[int]:
        """Tensors that have at least one slot."""
        return sorted(self._members)

    def assign(self, slots: Tensor, positions: Tensor, base: Tensor) -> None:
        """Gives slots to positions (and takes them from whatever they held)."""
        self.positions[slots] = positions
        self.base[slots] = base
        self._rebuild()

    def load(self, positions: Tensor, base: Tensor) -> None:
        """Replaces the whole table."""
        self.positions.copy_(positions)
        self.base.copy_(base)
        self._rebuild()

    def scatter(self, values: Tensor, active: int) -> None:
        """Writes the values of the first ``active`` slots into the tensors."""
        for index, (flat, slots) in self._members.items():
            if active < self.positions.numel():
                inside = slots < active
                flat, slots = flat[inside], slots[inside]
            put(self.layout.plain(index), flat, values[slots])

    def _rebuild(self) -> None:
        held = (self.positions >= 0).nonzero().squeeze(1)
        self._members = {index: (flat, held[places]) for index, flat, places in self.layout.split(self.positions[held])}
