"""Carries messages by broadcasts of ``torch.distributed``, between the processes of one group."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from unmask.errors import SyncError, SyncTimeoutError
from unmask.reading import Malformed
from unmask.sync.header import HEADER, Header, Kind
from unmask.sync.message import Message
from unmask.sync.transport import Held, Inbox, read_message

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Distributed:
    """Carries messages by broadcasts between the processes of one group, over gloo or NCCL. Nothing is pickled.

    Every process of the group takes part in each message: one publishes, and each of the others receives. A receiver that has
    joined late or missed a message tells the publisher so before the next one, which then is FULL (it holds everything). After
    a timeout or the loss of a process, the group cannot be used any more: this is a rule of `torch.distributed`.

    Args:
        group: The process group; None for all processes.
        src: The publisher's rank among all processes.

    Raises:
        SyncError: There is no process group, or this process or the publisher is no member of it.
    """

    def __init__(self, group: ProcessGroup | None = None, src: int = 0) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise SyncError("there is no process group yet; call torch.distributed.init_process_group() first.")
        members = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
        if dist.get_rank() not in members or src not in members:
            raise SyncError(
                f"process {dist.get_rank()} cannot exchange messages of process {src} in a group of the processes {members}; "
                "both must be members."
            )
        self._group, self._src = group, src
        self._device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def begin(self) -> int:
        """Returns the time now.

        Raises:
            SyncError: This process is not the one that publishes.
        """
        if dist.get_rank() != self._src:
            raise SyncError(
                f"process {dist.get_rank()} cannot publish: the group's publisher is process {self._src} (src=)."
            )
        return time.time_ns()

    def wanted(self) -> bool:
        """Meets the receivers, and returns True if one of them asks for a FULL message."""
        return self.meet(asking=False, end=None)

    def send(self, header: Header, message: bytearray) -> None:
        """Broadcasts the header, and then the payload."""
        data = torch.frombuffer(message, dtype=torch.uint8).to(self._device)
        self.broadcast(data[: HEADER.size], None)
        if len(message) > HEADER.size:
            self.broadcast(data[HEADER.size :], None)

    def inbox(self) -> Inbox:
        """Returns this process's end.

        Raises:
            SyncError: This process is the one that publishes.
        """
        if dist.get_rank() == self._src:
            raise SyncError(
                f"process {self._src} publishes (src=), so it cannot receive; the other processes of the group do."
            )
        return _Member(self)

    def meet(self, asking: bool, end: float | None) -> bool:
        """Returns True if one of the processes asks for a FULL message."""
        flag = torch.tensor([int(asking)], dtype=torch.int32, device=self._device)
        self._wait(lambda: dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), end)
        return bool(flag.item())

    def broadcast(self, data: Tensor, end: float | None) -> None:
        """Sends bytes from the publisher to all, or receives them."""
        self._wait(lambda: dist.broadcast(data, self._src, self._group, async_op=True), end)

    def _wait(self, begin: Callable[[], Any], end: float | None) -> None:
        """Waits for one exchange until a time of `time.monotonic`, or as long as the group waits."""
        try:
            work = begin()
            if end is None:
                work.wait()
            else:
                work.wait(datetime.timedelta(seconds=max(0.001, end - time.monotonic())))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # gloo, NCCL and the store raise these, as does a destroyed group
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            late = any(word in said.lower() for word in ("timeout", "timed out"))
            raise (SyncTimeoutError if late else SyncError)(
                "the exchange with the other processes of the group failed: one of them has ended, hangs, or does something "
                f"else. The group cannot be used any more. torch says: {said}"
            ) from error


class _Member:
    """A receiver's end of a group."""

    def __init__(self, group: Distributed) -> None:
        self._group, self._asking = group, True

    def ask(self) -> None:
        """Makes the next message a FULL one."""
        self._asking = True

    def receive(self, held: Held, timeout: float | None) -> Message:
        """Takes part in the next message."""
        end = None if timeout is None else time.monotonic() + timeout
        self._group.meet(self._asking, end)
        device = self._group._device
        start = torch.zeros(HEADER.size, dtype=torch.uint8, device=device)
        self._group.broadcast(start, end)
        try:
            header = Header.read(bytes(start.cpu().numpy()))
        except Malformed as malformed:
            raise SyncError(
                f"a message's header cannot be used: {malformed}. The processes are out of step."
            ) from malformed
        data = torch.cat([start, torch.zeros(header.payload, dtype=torch.uint8, device=device)])
        if header.payload:
            self._group.broadcast(data[HEADER.size :], end)
        if header.kind == Kind.FULL:
            self._asking = False
        return read_message(memoryview(data.cpu().numpy()))  # type: ignore[arg-type]
