"""Writes values into a receiver's tensors, all or none, and reads the bits that tensors hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.errors import SyncError
from unmask.gradients.entries import put, take
from unmask.sync.message import Content
from unmask.sync.support import DTYPES, bits_of
from unmask.sync.targets import Region

Write = tuple[Tensor, Tensor | None, Tensor]
"""A tensor, the flat indices at which it is written (None for all of it), and the values, in its dtype."""


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of one tensor of a receiver that hold places of one published tensor.

    Attributes:
        region: Where the published tensor lies.
        flat: (m,) int64 flat indices in the receiver's tensor, on its device.
        chosen: (m,) int64 their places among the published tensor's places, on that device; None for all of them.
    """

    region: Region
    flat: Tensor
    chosen: Tensor | None

    @classmethod
    def of(cls, region: Region, indices: NDArray) -> Entries:
        """Finds the entries of a published tensor, at ascending flat indices, that are in a region."""
        flat, chosen = region.inside(indices)
        device = region.tensor.device
        return cls(
            region,
            torch.from_numpy(flat).to(device, non_blocking=True),
            None if chosen is None else torch.from_numpy(chosen).to(device, non_blocking=True),
        )

    def own(self, published: NDArray) -> NDArray:
        """Returns those of a vector with one number for each place of the published tensor that belong to these entries."""
        return published if self.chosen is None else published[self.chosen.cpu().numpy()]


def value_writes(
    content: Content, entries: Mapping[int, Sequence[Entries]], regions: Mapping[str, Sequence[Region]]
) -> Iterator[Write]:
    """Yields the writes of all values of a message. The values of one dtype go to a device as one copy."""
    support, start = content.support, 0
    for dtype, run in support.runs():
        vector = _vector(content.placed[start:], dtype, sum(size for _, size in run))
        start += vector.nbytes
        on: dict[torch.device, Tensor] = {}
        at = 0
        for number, size in run:
            for each in entries[number]:
                device = each.flat.device
                if device not in on:
                    on[device] = vector if device.type == "cpu" else vector.pin_memory().to(device, non_blocking=True)
                values = on[device][at : at + size]
                yield each.region.tensor, each.flat, values if each.chosen is None else values[each.chosen]
            at += size
    start = 0
    for number in support.whole:
        spec = support.table[number]
        vector = _vector(content.whole[start:], spec.dtype, spec.numel)
        start += vector.nbytes
        for region in regions.get(spec.name, ()):
            yield region.view(), None, region.cut(vector.view(spec.shape))


def _vector(data: memoryview, dtype: str, size: int) -> Tensor:
    """Returns the first numbers of some bytes; it shares their memory."""
    little = np.dtype(f"<u{DTYPES[dtype].itemsize}")
    numbers = np.frombuffer(data, little, size).astype(little.newbyteorder("="), copy=False)
    return torch.from_numpy(numbers).view(DTYPES[dtype])


@torch.no_grad()
def apply(writes: Iterable[Write], back: Callable[[], Iterable[Write]] | None = None) -> None:
    """Makes some writes, or none: if one fails, those before it are undone.

    Args:
        writes: The writes.
        back: Returns the writes that undo them; None to keep what is overwritten for this.

    Raises:
        SyncError: A write failed. The tensors are as they were before.
    """
    done: list[Write] = []
    try:
        for tensor, flat, values in writes:
            if back is None:
                done.append((tensor, flat, tensor.clone() if flat is None else take(tensor, flat)))
            store(tensor, flat, values)
    except BaseException as error:  # also KeyboardInterrupt
        for each in reversed(done) if back is None else back():
            with contextlib.suppress(Exception):  # a tensor that cannot be written still holds its old values
                store(*each)
        if not isinstance(error, Exception):
            raise
        raise SyncError(f"the values could not be written: {error}. The model is as it was before.") from error


def store(tensor: Tensor, flat: Tensor | None, values: Tensor) -> None:
    """Makes one write."""
    if flat is None:
        tensor.copy_(values, non_blocking=True)
    elif tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, flat, values)
    else:
        put(tensor, flat, values)


def held_bits(wanted: Sequence[tuple[Tensor, Tensor]]) -> list[NDArray]:
    """Returns the bits that tensors hold at flat indices. The host waits once for each dtype and device."""
    taken = [take(tensor, flat) for tensor, flat in wanted]
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for each in taken:
        kinds.setdefault((each.dtype, each.device), []).append(each)
    parts = {kind: iter(torch.cat(same).cpu().split([t.numel() for t in same])) for kind, same in kinds.items()}
    return [bits_of(next(parts[each.dtype, each.device])) for each in taken]
