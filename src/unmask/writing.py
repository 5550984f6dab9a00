"""Files that are written whole or not at all: by way of a temporary one beside them. The standard library only."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, to be written to, that takes its name at the end; dropped if anything is raised.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "made", "a.txt")
        ...     with replacing(file) as part:
        ...         _ = part.write_text("whole")
        ...     file.read_text(), len(list(file.parent.iterdir()))
        ('whole', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> Path:
    """Replaces a file in one step, its content on the disk before it takes the name; returns the path."""
    with replacing(path) as part, part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def write_text(path: Path, text: str) -> Path:
    """`write_bytes` of a text in UTF-8."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int = 1) -> Path:
    """`write_text` of a JSON value and a line's end."""
    return write_text(path, json.dumps(value, indent=indent) + "\n")
