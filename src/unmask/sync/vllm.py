"""Hands a sparse change to vLLM: a delta, or each step of a selection in training.

vLLM's backend ``sparse_nccl`` takes *patches*: for one tensor of the checkpoint, flat positions and new values. Its loader maps
them to its own layout (fused tensors, tensor-parallel slices). Here are the arguments of its patches, and a transport that hands
them to its engine. vLLM itself is imported only where a `VLLM` is made.

The form of a patch and of the calls is that of vLLM's main branch of September 2026, after its pull request 53751: see
docs/training/weight_transfer/nccl.md and vllm/distributed/weight_transfer/sparse_nccl_engine.py there. Before it, a patch had
no ``full_shape`` and named the tensors of vLLM's own layout; such a version is refused.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.delta.delta import SparseDelta
from unmask.errors import MissingExtraError, SyncError
from unmask.gradients.entries import put
from unmask.sync.message import Content, Header, Message
from unmask.sync.publisher import Publisher
from unmask.sync.support import DTYPES, Change, Support, TensorSpec
from unmask.sync.transport import Inbox

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


class Engine(Protocol):
    """The part of vLLM's ``SparseNCCLTrainerWeightTransferEngine`` that a `VLLM` calls."""

    client: Any

    def send_weights(self, patches: Any) -> None:
        """Sends patches as one whole update."""

    def send_weight_chunk(self, patches: Any) -> None:
        """Sends patches inside an update that the client has started and will finish."""


class _Entries(NamedTuple):
    """Some entries of one tensor; ``indices`` is None for all of them."""

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
        source: A delta (the displaced one undoes it), or the publisher of a selection. For a method whose weights leave the
            selection again, such as `unmask.repeat_d3`, use a `VLLM`, which also sends those weights' base values.
        chunk_bytes: The bytes of indices and values in one list, at most. A larger tensor is split.
        device: The device to move the tensors to; None leaves them on the CPU. vLLM needs that of its communicator.

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
    _check_chunk_bytes(chunk_bytes)
    return _chunks(_of_delta(source) if isinstance(source, SparseDelta) else _of_publisher(source), chunk_bytes, device)


class VLLM:
    """Carries what a publisher sends to vLLM's engine for sparse updates; it is a transport without receivers of unmask.

    The patches of an update are handed over with ``engine.send_weights``, or in chunks with ``engine.send_weight_chunk`` between
    ``engine.client.start_weight_update()`` and ``finish_weight_update()``. vLLM must hold the base when the publisher starts. It
    keeps no positions, so each step sends them too: 6 bytes a weight in bfloat16, where `unmask.sync.Receiver` needs 2. Pause
    generation during an update, and reset vLLM's prefix cache after it.

    Args:
        engine: What vLLM's ``WeightTransferTrainerFactory.trainer_init`` returns for a ``SparseNCCLTrainerInitInfo``.
        chunk_bytes: See `to_vllm_patches`.
        device: The device of the engine's communicator; None for the current CUDA device, or the CPU without CUDA.
        patch: The class of the patches; None for vLLM's ``SparseWeightPatch``.

    Raises:
        MissingExtraError: vLLM is not installed.
        SyncError: vLLM's patches have other fields than `PatchArguments`, or ``chunk_bytes`` has no room for an entry.

    Example:
        ``publisher = unmask.sync.Publisher(selection, unmask.sync.VLLM(engine))``
    """

    def __init__(
        self,
        engine: Engine,
        chunk_bytes: int = CHUNK_BYTES,
        device: torch.device | str | None = None,
        patch: Callable[..., Any] | None = None,
    ) -> None:
        _check_chunk_bytes(chunk_bytes)
        self._engine, self._chunk_bytes = engine, chunk_bytes
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._patch = _patch_class() if patch is None else patch
        self._run = b""
        self._support = Support(())  # that of the last message that vLLM took
        self._touched = self._support  # the places at which vLLM may hold other weights than the base's

    def begin(self) -> int:
        """Returns the time now, in nanoseconds since 1970."""
        return time.time_ns()

    def wanted(self) -> bool:
        """Returns False, because vLLM asks for no message."""
        return False

    def inbox(self) -> Inbox:
        """Refuses to make a receiver.

        Raises:
            SyncError: Always.
        """
        raise SyncError(
            "vLLM itself receives what this transport carries; give Receiver another publisher's transport."
        )

    def send(self, header: Header, message: bytearray) -> None:
        """Hands the values of a message to vLLM, and the base's values where weights have left the selection.

        Raises:
            SyncError: vLLM did not take them, they cannot be sent as patches, or another publisher was here before.
        """
        if self._run not in (b"", header.run):
            raise SyncError(
                "this transport has carried another publisher, whose weights vLLM still holds. Load the base in vLLM again, and "
                "make a new VLLM."
            )
        content = Message.read(message).content(self._support)
        support = content.support
        touched = self._touched if self._run else Support(support.table)
        if touched.table != support.table:
            raise SyncError(
                "the model in training was cast after the first message; train it in one dtype, from the start."
            )
        chunks = list(_chunks(_of_content(content, touched), self._chunk_bytes, self._device))
        self._run, self._touched = header.run, touched.after(Change({}, support.since(touched).added))
        try:
            self._hand_over([[self._patch(**arguments) for arguments in chunk] for chunk in chunks])
        except Exception as error:
            raise SyncError(
                f"vLLM did not take version {header.version}: {error}. It may hold a part of it, so let it generate nothing; "
                "publish again, or load the base there again."
            ) from error
        self._support, self._touched = support, Support(support.table, support.places)

    def _hand_over(self, chunks: list[list[Any]]) -> None:
        if len(chunks) == 1:
            self._engine.send_weights(chunks[0])
        elif chunks:
            self._engine.client.start_weight_update()
            for chunk in chunks:
                self._engine.send_weight_chunk(chunk)
            self._engine.client.finish_weight_update()


def _patch_class() -> Callable[..., Any]:
    """Imports vLLM's class of patches, and refuses one of another form."""
    try:
        from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch
    except ImportError as error:
        raise MissingExtraError(
            f"vLLM's sparse weight transfer cannot be imported ({error}); install a version of vllm that has it."
        ) from error
    fields = [field.name for field in dataclasses.fields(SparseWeightPatch)]
    if set(fields) != set(PatchArguments.__annotations__):
        raise SyncError(
            f"this vLLM's SparseWeightPatch has the fields {', '.join(fields)}, and unmask knows "
            f"{', '.join(PatchArguments.__annotations__)}. Install a version of vllm after its pull request 53751."
        )
    patch: Callable[..., Any] = SparseWeightPatch
    return patch


def _check_chunk_bytes(chunk_bytes: int) -> None:
    if chunk_bytes < _LARGEST_ENTRY:
        raise SyncError(
            f"chunk_bytes = {chunk_bytes}; an entry has up to {_LARGEST_ENTRY} bytes, so give {_LARGEST_ENTRY} or more."
        )


def _of_delta(delta: SparseDelta) -> Iterator[_Entries]:
    """Yields what a delta sets."""
    for name in sorted({*delta.sparse, *delta.whole}):
        entry, whole = delta.sparse.get(name), delta.whole.get(name)
        if whole is None:
            assert entry is not None, "it is one of both"
            yield _Entries(name, entry.shape, entry.indices, entry.values)
            continue
        if entry is not None:  # its trained entries lie over the tensor as it was before training
            whole = whole.clone()
            put(whole, entry.indices, entry.values)
        yield _Entries(name, tuple(whole.shape), None, whole.reshape(-1))


def _of_publisher(publisher: Publisher) -> Iterator[_Entries]:
    """Yields what a publisher's next message would hold."""
    for part in publisher.parts():
        yield _Entries(part.spec.name, part.spec.shape, part.indices, part.values.reshape(-1))


def _of_content(content: Content, touched: Support) -> Iterator[_Entries]:
    """Yields what a message sets, and first the base values of the places that were ``touched`` and are no longer selected."""
    support, table = content.support, content.support.table
    for number, gone in support.since(touched).removed.items():
        had = touched.places[number]
        base = had.base[np.isin(had.indices, gone, assume_unique=True)]
        yield _entries(table[number], torch.from_numpy(gone), base)
    for number, bits in content.once.items():  # before the trained entries that lie over it
        yield _entries(table[number], None, bits)
    start = 0
    for number, places in support.places.items():
        stop = start + places.indices.size * table[number].itemsize
        yield _entries(
            table[number], torch.from_numpy(places.indices), np.frombuffer(content.placed[start:stop], np.uint8)
        )
        start = stop
    start = 0
    for number in support.whole:
        stop = start + table[number].numel * table[number].itemsize
        yield _entries(table[number], None, np.frombuffer(content.whole[start:stop], np.uint8))
        start = stop


def _entries(spec: TensorSpec, indices: Tensor | None, bits: NDArray) -> _Entries:
    """Returns entries of a tensor whose values are given as bits."""
    values = torch.from_numpy(bits.view(np.uint8)).view(DTYPES[spec.dtype])
    return _Entries(spec.name, spec.shape, indices, values)


def _chunks(
    entries: Iterable[_Entries], chunk_bytes: int, device: torch.device | str | None
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
