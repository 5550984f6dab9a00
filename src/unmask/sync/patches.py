"""Turns weights into the arguments of vLLM's patches: those of a delta, or those that a publisher would send.

A *patch* is what vLLM's backend ``sparse_nccl`` takes: flat positions in one tensor of the checkpoint, and new values. vLLM's
loader maps them to its own layout (fused tensors, tensor-parallel slices). vLLM is not imported here.

The form of a patch is that of vLLM's main branch of September 2026, after its pull request 53751: see
docs/training/weight_transfer/nccl.md and vllm/distributed/weight_transfer/sparse_nccl_engine.py there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from unmask.delta.delta import SparseDelta
from unmask.errors import SyncError
from unmask.gradients.entries import put
from unmask.sync.publisher import Publisher

CHUNK_BYTES = 1 << 28
"""The size of a chunk of patches, at most: indices and values together, in bytes."""
_INDEX_BYTES = 4
_LARGEST_ENTRY = _INDEX_BYTES + 8  # with a float64 value
_LARGEST = 2**31  # The largest int32 is one less.


class PatchArguments(TypedDict):
    """The arguments of vLLM's ``SparseWeightPatch``.

    Attributes:
        name: The tensor's name in the checkpoint.
        indices: (n,) int32 flat (row-major) indices, ascending and contiguous in memory.
        values: (n,) the new values, in the tensor's dtype, contiguous in memory.
        full_shape: The shape of the whole tensor.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


class Entries(NamedTuple):
    """Some entries of one tensor.

    Attributes:
        name: The tensor's name.
        shape: The shape of the whole tensor.
        indices: (n,) int64 flat indices; None for all entries of the tensor.
        values: (n,) the new values.
    """

    name: str
    shape: tuple[int, ...]
    indices: Tensor | None
    values: Tensor


def to_vllm_patches(
    source: SparseDelta | Publisher, chunk_bytes: int = CHUNK_BYTES, device: torch.device | str | None = None
) -> Iterator[list[PatchArguments]]:
    """Yields the arguments of vLLM's patches, in lists, that turn the base into the trained model.

    A tensor that was trained whole is a patch with all its indices. The names are those of the model in training. Where the
    checkpoint has others (transformers fuses the experts of some models into one tensor), vLLM cannot place them.

    Args:
        source: A delta (the displaced one undoes it), or the publisher of a selection, for its current weights. Take a
            `unmask.sync.VLLM` for a method whose weights leave the selection again (`unmask.repeat_d3`), and for tensors that
            the base lacks: it also sends what those weights were before, and these tensors.
        chunk_bytes: The bytes of indices and values in one list, at most. A larger tensor is split.
        device: The device to move the tensors to; None leaves them where they are. vLLM needs that of its communicator.

    Raises:
        SyncError: ``chunk_bytes`` has no room for an entry. While iterating: a tensor has more than 2^31 entries or is no
            floating-point tensor, or a value is NaN, which vLLM takes for "unchanged".

    Example:
        >>> import unmask
        >>> from torch import nn
        >>> selection = unmask.select(nn.Linear(8, 4), unmask.random_mask(budget=6))
        >>> [[patch]] = to_vllm_patches(selection.delta())
        >>> patch["name"], patch["indices"].dtype, tuple(patch["values"].shape), patch["full_shape"]
        ('weight', torch.int32, (6,), (4, 8))
    """
    check_chunk_bytes(chunk_bytes)
    return chunks_of(
        _of_delta(source) if isinstance(source, SparseDelta) else _of_publisher(source), chunk_bytes, device
    )


def check_chunk_bytes(chunk_bytes: int) -> None:
    """Refuses lists of patches that have no room for an entry."""
    if chunk_bytes < _LARGEST_ENTRY:
        raise SyncError(
            f"chunk_bytes = {chunk_bytes}; an entry has up to {_LARGEST_ENTRY} bytes, so give {_LARGEST_ENTRY} or more."
        )


def _of_delta(delta: SparseDelta) -> Iterator[Entries]:
    """Yields what a delta sets."""
    for name in sorted({*delta.sparse, *delta.whole}):
        entry, whole = delta.sparse.get(name), delta.whole.get(name)
        if whole is None:
            assert entry is not None, "it is one of both"
            yield Entries(name, entry.shape, entry.indices, entry.values)
            continue
        if entry is not None:  # its trained entries lie over the tensor as it was before training
            whole = whole.clone()
            put(whole, entry.indices, entry.values)
        yield Entries(name, tuple(whole.shape), None, whole.reshape(-1))


def _of_publisher(publisher: Publisher) -> Iterator[Entries]:
    """Yields what a publisher's next message would hold."""
    for part in publisher.parts():
        yield Entries(part.spec.name, part.spec.shape, part.indices, part.values.reshape(-1))


def chunks_of(
    entries: Iterable[Entries], chunk_bytes: int, device: torch.device | str | None
) -> Iterator[list[PatchArguments]]:
    """Cuts entries into lists of patches that have up to ``chunk_bytes`` bytes each."""
    chunk: list[PatchArguments] = []
    room = chunk_bytes
    for name, shape, indices, values in entries:
        _check_patch(name, shape, values)
        # vLLM sends memory as it lies, so a tensor with strides would arrive wrong (its issue 57130).
        places = torch.arange(values.numel(), dtype=torch.int32) if indices is None else indices.to(torch.int32)
        places, values = places.to(device).contiguous(), values.to(device).contiguous()
        width, start = _INDEX_BYTES + values.element_size(), 0
        while start < values.numel():
            if room < width:
                yield chunk
                chunk, room = [], chunk_bytes
            stop = min(values.numel(), start + room // width)
            piece = PatchArguments(name=name, indices=places[start:stop], values=values[start:stop], full_shape=shape)
            chunk.append(piece)
            room -= width * (stop - start)
            start = stop
    if chunk:
        yield chunk


def _check_patch(name: str, shape: tuple[int, ...], values: Tensor) -> None:
    """Refuses what vLLM's patches cannot hold."""
    if math.prod(shape) > _LARGEST:
        raise SyncError(
            f"{name!r} has {math.prod(shape):,} entries, and the int32 indices of vLLM's patches reach {_LARGEST:,}."
        )
    if not values.is_floating_point():
        raise SyncError(
            f"{name!r} is {values.dtype}, and vLLM's patches set floating-point tensors only; leave it out of training."
        )
    if values.isnan().any():
        raise SyncError(f"{name!r} holds NaN, which vLLM takes for an unchanged entry; it cannot be sent as a patch.")
