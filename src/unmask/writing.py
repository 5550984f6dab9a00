"""Files that are written whole or not at all: by way of a temporary one beside them. The standard library only."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile  # noqa: F401 (the example of `replacing`)
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unmask.errors import writing_to


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, to be written to, that takes its name at the end; dropped if anything is raised.

    Its content is on the disk before it takes the name, and its permissions are those of any new file (the umask's).

    Raises:
        WriteError: The disk is full, or the place cannot be written to.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "made", "a.txt")
        ...     with replacing(file) as part:
        ...         _ = part.write_text("whole")
        ...     file.read_text(), len(list(file.parent.iterdir()))
        ('whole', 1)
    """
    part = path.with_name(f".{path.name}{secrets.token_hex(4)}.part")
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield from _replaced(path, part)


def _replaced(path: Path, part: Path) -> Iterator[Path]:
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors puts a file of its own there, which nobody else may read
        to_disk(part)
        os.replace(part, path)
        to_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk (POSIX): it then outlives a power cut."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # some file systems refuse it of folders
            raise
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> Path:
    """Replaces a file in one step, its content on the disk before it takes the name; returns the path."""
    with replacing(path) as part:
        part.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """`write_bytes` of a text in UTF-8."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int = 1) -> Path:
    """`write_text` of a JSON value and a line's end."""
    return write_text(path, json.dumps(value, indent=indent) + "\n")


def append_json(path: Path, row: Any) -> None:
    """Appends a line with a JSON value, on the disk when this returns; a last line that a kill cut short stays by itself.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "rows.jsonl")
        ...     _ = file.write_text('{"a": 1}\\n{"a": ')
        ...     append_json(file, {"a": 3})
        ...     file.read_text().splitlines()
        ['{"a": 1}', '{"a": ', '{"a": 3}']
    """
    with path.open("a+b") as file:
        cut = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * cut + json.dumps(row).encode("utf-8") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def discard(folder: Path) -> None:
    """Removes a folder with all that is in it: in one step it loses its name, so a kill leaves no half of it under that."""
    if not folder.exists():
        return
    gone = folder.with_name(f".{folder.name}{secrets.token_hex(4)}.removed")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep_up(folder: Path) -> None:
    """Removes what kills left in a folder in the midst of `replacing` and `discard`. No other process may write there."""
    for left in (*folder.glob(".*.part"), *folder.glob(".*.removed")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                left.unlink()
