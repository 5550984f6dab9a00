"""Collects the gradients of all wanted entries in one vector, whose parts stand for the tensors in autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from unmask.gradients.entries import Entries
from unmask.gradients.tapped import StandIn

_known: WeakValueDictionary[int, Entries] = WeakValueDictionary()  # by the address of their indices


def entries_at(flat: Tensor, rows: int, columns: int) -> Entries:
    """Returns the entries of a matrix (rows, columns) at the indices ``flat``.

    They are the collected ones if these have the same indices: what follows from the indices is then computed once.
    """
    known = _known.get(flat.data_ptr())
    if known is None or known.flat.numel() != flat.numel() or known.shape != (rows, columns):
        return Entries((rows, columns), flat, flat)
    return known


class Collector:
    """Makes a *placeholder* for each tensor, a vector of zeros that only carries the gradient of the tensor's entries.

    The placeholders are parts of one leaf of autograd's graph, so autograd itself puts the gradients together: a step costs one
    node of the graph for all tensors, and each tensor's placeholder is the same at every forward. Tensors on other devices, and
    float64 ones, have another leaf.

    Args:
        entries: The entries whose gradients are wanted, by the tensor's index.
        tensors: The tensors.
        arrived: Takes the slots (n,) int64 and their gradient (n,), when a backward has brought one.

    Attributes:
        entries: The same mapping.
        parts: The stand-in of each tensor.

    Example:
        >>> entries = {0: Entries((1, 3), torch.tensor([1]), torch.tensor([5]))}
        >>> collector = Collector(entries, [torch.ones(3)], lambda slots, gradient: print(slots, gradient))
        >>> (2 * collector.parts[0].proxy).sum().backward()
        tensor([5]) tensor([2.])
    """

    def __init__(
        self, entries: Mapping[int, Entries], tensors: Sequence[Tensor], arrived: Callable[[Tensor, Tensor], None]
    ) -> None:
        self.entries = entries
        self.parts: dict[int, StandIn] = {}
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index in entries:
            wide = torch.float64 if tensors[index].dtype == torch.float64 else torch.float32
            groups.setdefault((tensors[index].device, wide), []).append(index)
        for (device, dtype), indices in groups.items():
            slots = torch.cat([entries[index].slots for index in indices])
            with torch.enable_grad():
                # One zero, expanded, takes no memory.
                leaf = torch.zeros((), dtype=dtype, device=device).expand(slots.shape).requires_grad_()
                leaf.register_post_accumulate_grad_hook(partial(_hand_over, slots, arrived))
                parts = leaf.split([entries[index].flat.numel() for index in indices])
            for index, part in zip(indices, parts, strict=True):
                self.parts[index] = StandIn(part, entries[index])
                if part.numel():
                    _known[entries[index].flat.data_ptr()] = entries[index]


def _hand_over(slots: Tensor, arrived: Callable[[Tensor, Tensor], None], leaf: Tensor) -> None:
    """Passes a leaf's gradient on, and frees it."""
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None, "autograd has just accumulated it"
    arrived(slots, gradient.detach())
