"""Carries messages from a publisher to receivers: the interface, and the transport inside one process."""

from __future__ import annotations

import queue
import time
import weakref
from typing import NamedTuple, Protocol

from unmask.errors import SyncError, SyncTimeoutError
from unmask.reading import Malformed
from unmask.sync.header import Header, Kind
from unmask.sync.message import Message


class Held(NamedTuple):
    """The state that a receiver holds.

    Attributes:
        run: The run of the publisher; empty bytes before the first message.
        version: The version; 0 before the first message.
    """

    run: bytes = b""
    version: int = 0


class Inbox(Protocol):
    """A receiver's end of a transport."""

    def receive(self, held: Held, timeout: float | None) -> Message:
        """Waits for the next message, for at most ``timeout`` seconds; None waits for good.

        Raises:
            SyncTimeoutError: There was none in time.
            SyncError: A message was damaged, or the publisher was lost.
        """

    def ask(self) -> None:
        """Asks the publisher for a FULL message next, where the transport can do so."""


class Transport(Protocol):
    """Carries messages from one publisher to receivers."""

    def begin(self) -> int:
        """Returns the ``started`` of a publisher that starts now (see `unmask.sync.header.Header`)."""

    def wanted(self) -> bool:
        """Returns True if the next message must be a FULL one. The publisher calls this once before each message."""

    def send(self, header: Header, message: bytearray) -> None:
        """Sends a message to all receivers, or raises an error of unmask."""

    def inbox(self) -> Inbox:
        """Returns the end of a new receiver."""


class InProcess:
    """Carries messages inside one process, also between its threads. Each receiver gets every message sent since it was made.

    If a receiver is made after the publisher's first message, the next message is FULL (it holds everything).
    """

    def __init__(self) -> None:
        self._inboxes: weakref.WeakSet[_Queue] = weakref.WeakSet()

    def begin(self) -> int:
        """Returns the time now."""
        return time.time_ns()

    def wanted(self) -> bool:
        """Returns True if a receiver has asked."""
        return any(inbox.asking for inbox in list(self._inboxes))

    def send(self, header: Header, message: bytearray) -> None:
        """Puts the message into every receiver's queue."""
        for inbox in list(self._inboxes):
            inbox.put(message, header.kind == Kind.FULL)

    def inbox(self) -> Inbox:
        """Returns a new queue."""
        inbox = _Queue()
        self._inboxes.add(inbox)
        return inbox


class _Queue:
    """The messages that wait for one receiver."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self.asking = True

    def put(self, message: bytearray, full: bool) -> None:
        self.asking = self.asking and not full
        self._messages.put(message)

    def ask(self) -> None:
        self.asking = True

    def receive(self, held: Held, timeout: float | None) -> Message:
        try:
            data = self._messages.get(timeout=timeout) if timeout != 0 else self._messages.get_nowait()
        except queue.Empty:
            raise SyncTimeoutError(
                f"no message came within {timeout or 0:.3g} s; version {held.version} is held. Call publisher.publish() after "
                "each optimizer step, and publisher.resync() if a receiver joins between two of them."
            ) from None
        return read_message(data)


def read_message(data: bytearray | memoryview) -> Message:
    """Reads a message that came whole, by what the transport knows.

    Raises:
        SyncError: The message is damaged.
    """
    try:
        return Message.read(data)
    except Malformed as malformed:
        raise SyncError(
            f"a message cannot be used: {malformed}. Nothing was changed; the next FULL message mends this "
            "(publisher.resync())."
        ) from malformed
