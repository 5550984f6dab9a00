"""VLLM: hands each step of a selection in training to vLLM's engine for sparse updates.

The calls are those of vLLM's main branch of September 2026, after its pull request 53751 (see `unmask.sync.patches`). Before it,
patches had no ``full_shape`` and named the tensors of vLLM's own layout; such a version is refused. vLLM is imported only
where a `VLLM` is made.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.errors import MissingExtraError, SyncError
from unmask.sync.header import Header
from unmask.sync.message import Content, Message
from unmask.sync.patches import CHUNK_BYTES, Entries, PatchArguments, check_chunk_bytes, chunks_of
from unmask.sync.support import DTYPES, Change, Support, TensorSpec
from unmask.sync.transport import Inbox


class Engine(Protocol):
    """The part of vLLM's ``SparseNCCLTrainerWeightTransferEngine`` that a `VLLM` calls."""

    client: Any

    def send_weights(self, patches: Any) -> None:
        """Sends patches as one whole update."""

    def send_weight_chunk(self, patches: Any) -> None:
        """Sends patches inside an update that the client has started and will finish."""


class VLLM:
    """Carries what a publisher sends to vLLM's engine for sparse updates; it is a transport without receivers of unmask.

    The patches of an update are handed over with ``engine.send_weights``, or in chunks with ``engine.send_weight_chunk`` between
    ``engine.client.start_weight_update()`` and ``finish_weight_update()``. vLLM must hold the base when the publisher starts. It
    keeps no positions, so each step sends them too: 6 bytes a weight in bfloat16, where `unmask.sync.Receiver` needs 2. Pause
    generation during an update, and reset vLLM's prefix cache after it.

    Args:
        engine: What vLLM's ``WeightTransferTrainerFactory.trainer_init`` returns for a ``SparseNCCLTrainerInitInfo``.
        chunk_bytes: See `unmask.sync.to_vllm_patches`.
        device: The device of the engine's communicator; None for the current CUDA device, or the CPU without CUDA.
        patch: The class of the patches; None for vLLM's ``SparseWeightPatch``.

    Raises:
        MissingExtraError: vLLM is not installed.
        SyncError: vLLM's patches have other fields than `unmask.sync.PatchArguments`, or ``chunk_bytes`` is too small.

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
        check_chunk_bytes(chunk_bytes)
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
        chunks = list(chunks_of(_of_content(content, touched), self._chunk_bytes, self._device))
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


def _of_content(content: Content, touched: Support) -> Iterator[Entries]:
    """Yields what a message sets, and first the base values of the places that were ``touched`` and are no longer selected."""
    support, table = content.support, content.support.table
    for number, gone in support.since(touched).removed.items():
        yield _entries(table[number], torch.from_numpy(gone), touched.places[number].base_at(gone))
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


def _entries(spec: TensorSpec, indices: Tensor | None, bits: NDArray) -> Entries:
    """Returns entries of a tensor whose values are given as bits."""
    values = torch.from_numpy(bits.view(np.uint8)).view(DTYPES[spec.dtype])
    return Entries(spec.name, spec.shape, indices, values)
