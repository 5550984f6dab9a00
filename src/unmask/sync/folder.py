"""Carries messages as files in a folder, which processes of another host, or copies of a bucket, may read."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from unmask.errors import SyncError, SyncTimeoutError
from unmask.files import check_folder, write_bytes
from unmask.reading import Malformed
from unmask.sync.header import Header, Kind
from unmask.sync.message import Message
from unmask.sync.transport import Held, Inbox

_NAME = re.compile(r"(\d{20})-([0-9a-f]{32})-(\d{12})-(full|epoch|step)\.sync")


class _File(NamedTuple):
    """A message's file; files sort by run, and then by version.

    Attributes:
        started: The time at which the publisher started, in nanoseconds.
        run: The publisher's run, in hex.
        version: The version.
        kind: ``"full"``, ``"epoch"`` or ``"step"``.
        name: The file's name.
    """

    started: int
    run: str
    version: int
    kind: str
    name: str


class Folder:
    """Carries messages as files in a folder. Each file appears whole or not at all, and is on the disk before it has its name.

    A reader may see the files late, in any order, or cut (as copies of a bucket are for a while). It waits for those that it
    needs, and takes a newer FULL message (one that holds everything) where one is missing. Old files are removed; the last two
    FULL messages and all that follow them are kept. When a new publisher sends its first message, the files of earlier ones
    are removed.

    Args:
        path: The folder. The publisher makes it.
        full_every: The number of versions from one FULL message to the next; a reader that joins late starts at one.
        poll: The seconds between two looks into the folder.

    Raises:
        ConfigError: The path cannot be a folder that is written to.
        SyncError: ``full_every`` or ``poll`` is too small.

    Example:
        >>> import tempfile, torch, unmask
        >>> model, copy = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
        >>> _ = copy.load_state_dict(model.state_dict())
        >>> with tempfile.TemporaryDirectory() as path:
        ...     publisher = unmask.sync.Publisher(unmask.select(model, unmask.pafi(budget=6)), Folder(path))
        ...     receiver = unmask.sync.Receiver(copy, Folder(path))
        ...     publisher.publish().version, receiver.receive(timeout=5.0)
        (1, 1)
    """

    def __init__(self, path: str | os.PathLike[str], full_every: int = 64, poll: float = 0.02) -> None:
        if full_every < 1 or poll <= 0:
            raise SyncError(f"full_every = {full_every}, poll = {poll}; give a count from 1, and seconds above 0.")
        self.path, self.full_every, self.poll = Path(path), full_every, poll
        self._sent = 0  # messages since the last FULL one, that one counted; 0 before the first

    def begin(self) -> int:
        """Returns the time now, or a later one if the folder holds messages of a publisher whose clock was ahead."""
        check_folder(self.path, "the folder of unmask.sync")
        self._sent = 0
        return max([time.time_ns(), *(file.started + 1 for file in self._files())])

    def wanted(self) -> bool:
        """Returns True if enough messages came after the last FULL one."""
        return not self._sent or self._sent >= self.full_every

    def send(self, header: Header, message: bytearray) -> None:
        """Writes a file, and removes those that no reader needs any more.

        Raises:
            WriteError: The disk is full, or the folder cannot be written to.
        """
        kind = header.kind.word
        name = f"{header.started:020d}-{header.run.hex()}-{header.version:012d}-{kind}.sync"
        write_bytes(self.path / name, message)
        self._sent = 1 if header.kind == Kind.FULL else self._sent + 1
        if header.kind == Kind.FULL:
            files = self._files()
            full = [file.version for file in files if file.run == header.run.hex() and file.kind == "full"]
            for file in files:
                earlier = file.run == header.run.hex() and file.version < full[-2:][0]
                if earlier or file.started < header.started:
                    with contextlib.suppress(OSError):  # another process may have removed it
                        (self.path / file.name).unlink()

    def inbox(self) -> Inbox:
        """Returns a reader of the folder."""
        return _Reader(self)

    def _files(self) -> list[_File]:
        """Returns the messages in the folder, sorted."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        found = [(match, name) for name in names if (match := _NAME.fullmatch(name))]
        return sorted(_File(int(m[1]), m[2], int(m[3]), m[4], name) for m, name in found)


class _Reader:
    """A receiver's view of a folder."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def ask(self) -> None:
        """Does nothing: the folder holds a FULL message already."""

    def receive(self, held: Held, timeout: float | None) -> Message:
        """Waits for the message after the held one, or for a newer FULL one."""
        end = None if timeout is None else time.monotonic() + timeout
        said = "it holds no message that follows"
        while True:
            for file in self._candidates(held):
                try:
                    return self._read(file)
                except Malformed as malformed:
                    said = f"{file.name!r} cannot be used yet: {malformed}"
                except FileNotFoundError:  # It was removed since the list was read.
                    said = f"{file.name!r} was removed"
                except OSError as error:
                    said = f"{file.name!r} cannot be read: {error.strerror or error}"
            if end is not None and time.monotonic() >= end:
                raise SyncTimeoutError(
                    f"no message came within {timeout or 0:.3g} s in {str(self._folder.path)!r}: {said}. Version "
                    f"{held.version} is held."
                )
            time.sleep(self._folder.poll)

    def _candidates(self, held: Held) -> list[_File]:
        """Returns the files that can be taken next, the best first: the next version, then the newest FULL message."""
        files = self._folder._files()
        if not files:
            return []
        last = [file for file in files if file[:2] == files[-1][:2]]  # of the last publisher
        if last[0].run != held.run.hex():
            return [file for file in reversed(last) if file.kind == "full"]
        following = [file for file in last if file.version == held.version + 1]
        return following + [file for file in reversed(last) if file.kind == "full" and file.version > held.version + 1]

    def _read(self, file: _File) -> Message:
        path = self._folder.path / file.name
        data = bytearray(path.stat().st_size)
        with path.open("rb") as opened:
            read = opened.readinto(data)
        message = Message.read(memoryview(data)[:read])
        header = message.header
        if (header.started, header.run.hex(), header.version, header.kind.word) != file[:4]:
            raise Malformed("its name is that of another message")
        return message
