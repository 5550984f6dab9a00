"""Makes every state that a kill could leave of a folder, and disks that are full from some operation on.

Python reports every file before it opens, makes, renames or removes it (`sys.addaudithook`). The files that torch and
safetensors write themselves are reported around their calls. Between two operations a file may be cut anywhere.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

Content = dict[str, bytes | None]  # by path inside the folder; None for a folder
_PLACE = {"os.rename": 1, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0, "open": 0}
_listeners: list[Callable[[str, str], None]] = []


def _listen(event: str, args: tuple) -> None:
    if not _listeners or event not in _PLACE:
        return
    path = args[_PLACE[event]]
    if isinstance(path, int | None) or (event == "open" and not _writes(args)):
        return
    listener = _listeners.pop()  # its own operations are not reported
    try:
        listener(event, os.path.abspath(os.fsdecode(path)))
    finally:
        _listeners.append(listener)


def _writes(args: tuple) -> bool:
    mode, flags = args[1], args[2]
    return any(letter in (mode or "") for letter in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


sys.addaudithook(_listen)


@contextmanager
def hearing(folder: Path, on_event: Callable[[str, str], None]) -> Iterator[None]:
    """Calls ``on_event(event, path)`` before each operation under a folder; ``write``: a file of torch or safetensors."""
    root = str(folder.resolve())

    def under_root(event: str, path: str) -> None:
        if path == root or path.startswith(root + os.sep):
            on_event(event, path)

    def around(write: Callable, place: int) -> Callable:
        def writing(*args: Any, **kwargs: Any) -> Any:
            _listen_to_write(str(args[place]))
            done = write(*args, **kwargs)
            _listen_to_write(str(args[place]))
            return done

        return writing

    def _listen_to_write(path: str) -> None:
        listener = _listeners.pop()
        try:
            listener("write", os.path.abspath(path))
        finally:
            _listeners.append(listener)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", around(torch.save, 1))
        patch.setattr(safetensors.torch, "save_file", around(safetensors.torch.save_file, 1))
        _listeners.append(under_root)
        try:
            yield
        finally:
            _listeners.clear()


def content(folder: Path) -> Content:
    """Returns the content of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def restore(held: Content, folder: Path) -> None:
    """Makes a new folder with that content."""
    folder.mkdir()
    for name, data in sorted(held.items()):
        if data is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


@dataclass
class Recorder:
    """Records the content of a folder before each operation under it."""

    folder: Path
    states: list[Content] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, event: str, path: str) -> None:
        self.states.append(content(self.folder) if self.folder.exists() else {})
        self.events.append((event, path))

    def left_by_kills(self) -> list[Content]:
        """Returns every state once, and those in which a file that was being written is empty or cut in the middle."""
        found: list[Content] = []
        later = [*self.states[1:], content(self.folder)]
        for before, (event, path), after in zip(self.states, self.events, later, strict=True):
            found.append(before)
            named = os.path.relpath(path, self.folder.resolve()) if event == "os.rename" else None
            for name, data in after.items():
                if data and name != named and before.get(name) != data:
                    old = before.get(name) or b""
                    kept = len(old) if data.startswith(old) else 0
                    found += [after | {name: data[: kept + (len(data) - kept) * part // 2]} for part in (0, 1)]
        found.append(later[-1])
        once = {hash(tuple(sorted(state.items(), key=lambda item: item[0]))): state for state in found}
        return list(once.values())


class FullDisk:
    """Refuses all operations that need room from the nth on; ``refused`` counts them."""

    def __init__(self, operation: int) -> None:
        self.left, self.refused = operation, 0

    def __call__(self, event: str, path: str) -> None:
        if event in ("os.remove", "os.rmdir", "os.rename", "os.truncate"):
            return
        self.left -= 1
        if self.left > 0:
            return
        self.refused += 1
        if event != "write":
            raise OSError(errno.ENOSPC, "No space left on device", path)
        part = Path(path)
        if part.exists():
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
        if path.endswith((".pt", ".pth", ".bin")):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


class Killed(BaseException):
    """Ends a run as a kill would, except that `finally` blocks run."""
