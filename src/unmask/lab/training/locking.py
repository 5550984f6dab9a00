"""A lock file that at most one process holds, and that no dead process does. The standard library only."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

POSSIBLE = fcntl is not None
_held: set[Path] = set()  # by this process, whom the system would let have a lock twice


@contextlib.contextmanager
def holding(path: Path, keep: bool = True) -> Iterator[bool]:
    """Whether this process alone has the lock now. The lock is the system's, and goes with the process, however it ends.

    Args:
        path: The lock's file; its folder is there. While it is held, the file names the process.
        keep: Leave the file there afterwards; otherwise it is removed.

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
    if path in _held:  # closing another handle on the file would let the lock go
        yield False
        return
    handle = _locked(path)
    if handle is None:
        yield False
        return
    _held.add(path)
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock itself needs no room
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield True
    finally:
        _held.discard(path)
        if not keep:
            path.unlink(missing_ok=True)
        os.close(handle)


def holder(path: Path) -> str:
    """The process that has the lock, as its file names it: ``process 71 on HOST``."""
    if path.resolve() in _held:
        return "this process"
    try:
        return path.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def _locked(path: Path) -> int | None:
    """An open handle that holds the lock; None if another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(
                handle, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # of the process, and not shared with children as flock's
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle
        except (BlockingIOError, PermissionError):
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed the file in between
