"""Publisher: sends what a selection trains, after each optimizer step."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.selection.selection import Selection
from unmask.sync.header import Header, Kind
from unmask.sync.message import write_message
from unmask.sync.source import Source
from unmask.sync.support import Support, TensorSpec, bits_of
from unmask.sync.transport import Transport


@dataclass(frozen=True)
class Sent:
    """The message that `Publisher.publish` has sent.

    Attributes:
        version: The number of the message, from 1.
        epoch: The number of times that the support has changed, from 1.
        bytes: The size of the message.
        kind: ``"full"``, ``"epoch"`` or ``"step"``.
    """

    version: int
    epoch: int
    bytes: int
    kind: str


@dataclass(frozen=True, eq=False)
class Part:
    """The weights of one tensor that a publisher sends.

    Attributes:
        spec: The tensor's name, dtype and shape.
        indices: (n,) int64 flat (row-major) indices, ascending, on the CPU; None for a tensor that is sent whole.
        values: (n,) in the tensor's dtype, on the CPU; of the tensor's shape for one that is sent whole.
    """

    spec: TensorSpec
    indices: Tensor | None
    values: Tensor


class Publisher:
    """Sends what a selection trains to every receiver of a transport.

    The positions of the weights are sent once, and later only those that join or leave. Each message holds the values at all
    places, in the dtypes of their tensors, as the model's forward sees them. Tensors that are trained whole, and buffers that
    training has changed, are sent whole. No copy of the model is kept, and nothing is compared with one.

    Args:
        selection: The selection. It must be live.
        transport: A transport, such as `unmask.sync.InProcess`.

    Attributes:
        version: The number of the last message; 0 before the first.
        epoch: The number of times that the support has changed; 0 before the first message.

    Raises:
        SyncError: The model is quantised, or a tensor that no base has is sharded.

    Example:
        >>> import copy, unmask
        >>> from torch import nn
        >>> model, transport = nn.Linear(8, 4), unmask.sync.InProcess()
        >>> rollout = copy.deepcopy(model)
        >>> selection = unmask.select(model, unmask.pafi(budget=6))
        >>> optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
        >>> publisher, receiver = Publisher(selection, transport), unmask.sync.Receiver(rollout, transport)
        >>> for _ in range(3):
        ...     model(torch.ones(2, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     print(publisher.publish().kind, receiver.receive(), torch.equal(rollout.weight, model.weight))
        full 1 True
        step 2 True
        step 3 True
    """

    def __init__(self, selection: Selection, transport: Transport) -> None:
        self._source, self._transport = Source(selection), transport
        self._run, self._started = secrets.token_bytes(16), transport.begin()
        self._sent = Support(())  # the support of the last message
        self._base = b""  # its digest
        self.version = self.epoch = 0

    def publish(self) -> Sent:
        """Sends the current values. The first message is FULL (it holds everything), as is one that a receiver has asked for.

        Call it after ``optimizer.step()``. If it fails, the next call sends what this one could not.

        Raises:
            SyncError: The selection was released, a weight is NaN or infinite, or the transport cannot send.
            SelectionError: The model is no longer what was selected from.
        """
        return self._publish()

    def resync(self) -> Sent:
        """Sends a FULL message, which holds everything, for receivers that have joined late or missed a message.

        Raises:
            SyncError: See `publish`.
            SelectionError: See `publish`.
        """
        return self._publish(full=True)

    def parts(self) -> Iterator[Part]:
        """Yields the current weights of each tensor that is trained, in the order of a message; nothing is sent.

        Raises:
            SyncError: The selection was released, or a weight is NaN or infinite.
            SelectionError: The model is no longer what was selected from.
        """
        self._source.update()
        support = self._source.support
        for number, values in self._source.placed():
            yield Part(support.table[number], torch.from_numpy(support.places[number].indices), values)
        for number, values in self._source.whole():
            yield Part(support.table[number], None, values.clone())

    def _publish(self, full: bool = False) -> Sent:
        source, sent = self._source, self._sent
        source.update()
        support, placed, whole = source.support, dict(source.placed()), dict(source.whole())
        other = support.table != sent.table  # so at the first message
        change = support.since(Support(support.table) if other else sent)
        moved = other or bool(change)
        if self._transport.wanted() or full or other:
            kind, change = Kind.FULL, support.since(Support(support.table))
        else:
            kind = Kind.EPOCH if moved else Kind.STEP
        base = support.digest() if moved else self._base
        header = Header(kind, 0, self.version + 1, self.epoch + moved, self._started, 0, self._run, base)
        written = write_message(
            header,
            support,
            None if kind == Kind.STEP else change,
            source.once() if kind == Kind.FULL else {},
            map(bits_of, placed.values()),
            map(bits_of, whole.values()),
        )
        self._transport.send(header, written)
        self._sent, self._base, self.version, self.epoch = support, base, header.version, header.epoch
        return Sent(header.version, header.epoch, len(written), kind.word)
