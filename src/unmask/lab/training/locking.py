"""Locks a file, so that at most one process holds it. The system frees the lock when its process ends."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # the system is not POSIX
    fcntl = None  # type: ignore[assignment]

POSSIBLE = fcntl is not None
_held: set[Path] = set()  # the locks of this process: the system would grant each of them to it a second time


@contextlib.contextmanager
def holding(path: Path, keep: bool = True) -> Iterator[bool]:
    """Tries to take a lock for the time of the context; yields True if this process has it now, and False if another has.

    ``path`` is the lock's file, in a folder that exists. While the lock is held, the file names the process. Afterwards it is
    removed, unless ``keep`` is True.

    Raises:
        OSError: The file cannot be made, or its file system has no locks.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with holding(Path(folder, "lock")) as first, holding(Path(folder, "lock")) as second:
        ...         first, second
        (True, False)
    """
    assert fcntl is not None, "see POSSIBLE"
    path = path.resolve()
    handle = None if path in _held else _locked(path)  # to close a second handle on the file would free the lock
    if handle is None:
        yield False
        return
    _held.add(path)
    try:
        with contextlib.suppress(OSError):  # the disk may be full; the lock itself needs no space
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield True
    finally:
        _held.discard(path)
        if not keep:
            path.unlink(missing_ok=True)
        os.close(handle)


def holder(path: Path) -> str:
    """Names the process that holds the lock, as its file does: ``process 71 on HOST``."""
    if path.resolve() in _held:
        return "this process"
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def _locked(path: Path) -> int | None:
    """Returns an open handle that holds the lock; None if another process has it."""
    while True:
        with contextlib.ExitStack() as closing:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            closing.callback(os.close, handle)
            try:
                # Forked children share a lock by flock, which then outlives its process. One by lockf is the process's alone.
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return None
            with contextlib.suppress(FileNotFoundError):  # the last holder may have removed the file in between
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    closing.pop_all()
                    return handle
