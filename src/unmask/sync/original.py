"""Remembers what a receiver's tensors held before the first message: checks it against a publisher's base, and restores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.gradients.entries import put
from unmask.sync.targets import Region
from unmask.sync.writing import Entries, Write, held_bits


@dataclass(frozen=True, eq=False)
class Original:
    """The values that the written parts of a model had before the first message.

    Attributes:
        entries: The entries that were written, and the bits that they held before; by the tensor's name.
        whole: The tensors that were written whole, by name, and copies of what they held before. Entries of them do not count.
    """

    entries: Mapping[str, Sequence[tuple[Entries, NDArray]]] = field(default_factory=dict)
    whole: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def bits(self, wanted: Sequence[Entries]) -> list[NDArray]:
        """Returns the bits that some entries of the model held before the first message."""
        found = held_bits([(self._whole_or(each.region), each.flat) for each in wanted])
        for each, bits in zip(wanted, found, strict=True):
            for written, before in self._written(each.region.name):
                flat, held = each.flat.cpu().numpy(), written.flat.cpu().numpy()
                at = np.searchsorted(held, flat).clip(max=max(0, held.size - 1))
                hit = held[at] == flat if held.size else np.zeros(flat.shape, bool)
                bits[hit] = before[at[hit]]
        return found

    def copy_of(self, region: Region) -> Tensor:
        """Returns a copy of the tensor in which a region lies, as it was before the first message."""
        copy = self._whole_or(region).clone()
        for written, before in self._written(region.name):
            put(copy, written.flat, as_values(before, copy))
        return copy

    def writes(self) -> Iterator[Write]:
        """Yields the writes that take the model back to what it was before the first message."""
        for name in self.entries:
            for each, before in self._written(name):
                yield entries_write(each, before)
        for tensor, copy in self.whole.values():
            yield tensor, None, copy

    def _whole_or(self, region: Region) -> Tensor:
        return self.whole[region.name][1] if region.name in self.whole else region.tensor

    def _written(self, name: str) -> Sequence[tuple[Entries, NDArray]]:
        return () if name in self.whole else self.entries.get(name, ())


def entries_write(entries: Entries, bits: NDArray) -> Write:
    """Returns the write that gives some entries the values of these bits."""
    return entries.region.tensor, entries.flat, as_values(bits, entries.region.tensor)


def as_values(bits: NDArray, like: Tensor) -> Tensor:
    """Returns bits as numbers of a tensor's dtype, on its device: a vector.

    Example:
        >>> as_values(np.array([16320], np.uint16), torch.zeros(1, dtype=torch.bfloat16)).tolist()
        [1.5]
    """
    return torch.from_numpy(bits).view(like.dtype).to(like.device, non_blocking=True)
