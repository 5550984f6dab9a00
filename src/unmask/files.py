"""Writes files whole or not at all, reads and writes tensors with a JSON header, and checks output paths beforehand.

torch is imported inside the functions that need it, because ``unmask --help`` must not wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile  # noqa: F401 (The example of `replacing` uses it.)
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.errors import ConfigError, writing_to
from unmask.reading import MOST_VALUES, Malformed, parse_json

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "unmask"
MOST_HEADER = 32 * 2**20
"""The longest header that is read, in bytes. A delta of about 80,000 tensors has one as long."""


def cache_folder() -> Path:
    """Returns the user's folder for what can be made again: ``$UNMASK_CACHE``, else ``$XDG_CACHE_HOME/unmask``, else
    ``~/.cache/unmask``.
    """
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"
    return Path(os.environ.get("UNMASK_CACHE") or usual)


# Files that are written whole or not at all.


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary file that replaces ``path`` at the end, and that is removed if anything is raised.

    The content is on the disk before the file gets its name. The permissions are those of any new file (by the umask).

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
        try:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = part.stat().st_mode
            yield part
            part.chmod(mode)  # safetensors replaces the file by one that no other user may read.
            to_disk(part)
            os.replace(part, path)
            to_disk(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes ``folder`` at the end, and that is removed if anything is raised.

    Its files are on the disk before the folder gets its name. ``folder`` must be empty or not there.

    Raises:
        WriteError: The disk is full, or the place cannot be written to.
    """
    folder = folder.absolute()
    part = folder.with_name(f".{folder.name}{secrets.token_hex(4)}.part")
    with writing_to(folder):
        part.mkdir(parents=True)
        try:
            yield part
            for file in (*part.iterdir(), part):
                to_disk(file)
            if folder.is_dir():
                folder.rmdir()
            part.rename(folder)
            to_disk(folder.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk (on POSIX systems only)."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # Some file systems refuse this for folders.
            raise
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes | bytearray) -> Path:
    """Replaces a file in one step, and returns its path. The content is on the disk before the file gets its name."""
    with replacing(path) as part:
        part.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Writes a text in UTF-8 with `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int = 1) -> Path:
    """Writes a JSON value and an end of line with `write_text`."""
    return write_text(path, json.dumps(value, indent=indent) + "\n")


def append_json(path: Path, row: Any) -> None:
    """Appends a JSON value as a line, and returns when it is on the disk. A last line that a kill cut short is left as it is.

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
    """Removes a folder with all its content. The folder is renamed first, so a kill leaves no half of it under its name."""
    if not folder.exists():
        return
    gone = folder.with_name(f".{folder.name}{secrets.token_hex(4)}.removed")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep_up(folder: Path) -> None:
    """Removes what killed calls of `replacing` and `discard` left in a folder. No other process may write there."""
    for left in (*folder.glob(".*.part"), *folder.glob(".*.removed")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


# Tensors with a JSON header.


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Writes tensors and a JSON header to one file, and returns its path.

    Raises:
        WriteError: The disk is full, or the file cannot be written there. An earlier file of that name is kept.
    """
    from safetensors.torch import save_file

    with replacing(path) as part:
        save_file(dict(tensors), part, metadata={_KEY: json.dumps(header, sort_keys=True)})
    return path


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Reads a file of `write_tensors`, and returns its tensors and its header.

    Raises:
        Malformed: The file is no safetensors file, is truncated, has a header that is too large, or has none of unmask's.
    """
    from safetensors import safe_open

    header = safetensors_header(path)
    held = sum(header.count(sign) for sign in (b"[", b"{", b","))
    if held > MOST_VALUES:
        raise Malformed(f"its header has about {held:,} values; at most {MOST_VALUES:,} are read")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # The library raises errors of many classes.
        raise Malformed(f"it cannot be read as safetensors ({error}), so it is truncated or damaged") from error
    if text is None:
        raise Malformed(f"it is a safetensors file of something else (it lacks the {_KEY!r} metadata)")
    return tensors, parse_json(text, MOST_HEADER)


def safetensors_header(path: Path) -> bytes:
    """Returns the header of a safetensors file, unparsed.

    Raises:
        Malformed: The file cannot be read, is truncated, or has a header of more than `MOST_HEADER` bytes.
    """
    try:
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            if length > path.stat().st_size - 8:
                raise Malformed("it is shorter than its header says, so it is truncated or damaged")
            if length > MOST_HEADER:
                raise Malformed(f"its header has {length:,} bytes; at most {MOST_HEADER:,} are read")
            return raw.read(length)
    except OSError as error:
        raise Malformed(f"it cannot be read ({error.strerror or error})") from error


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 over a header (without its entry ``"checksum"``) and the tensors' names, dtypes, shapes and bytes."""
    sha = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "checksum"}, sort_keys=True).encode())
    for key in sorted(tensors):
        sha.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        sha.update(tensor_bytes(tensors[key]))
    return sha.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns a tensor's bytes in row-major order, the least significant byte of each number first. Any dtype works.

    Example:
        >>> import torch
        >>> tensor_bytes(torch.tensor([1, 258], dtype=torch.int16)).hex()
        '01000201'
    """
    import numpy as np
    import torch

    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy()
    size = flat.element_size() // (2 if flat.is_complex() else 1)
    if sys.byteorder == "big" and size > 1:
        data = np.ascontiguousarray(data.reshape(-1, size)[:, ::-1]).reshape(-1)
    return memoryview(data)  # type: ignore[arg-type]


# Checks of an output path before work starts.


def check_folder(path: str | os.PathLike[str], name: str = "output") -> Path:
    """Returns the path of a folder that can be written to, or refuses it. The folder need not exist, and is not made.

    The name is that of the option or setting, for the message.

    Raises:
        ConfigError: The path is a file, or lies below one, or cannot be written to.

    Example:
        >>> check_folder("/dev/null/run")
        Traceback (most recent call last):
        unmask.errors.ConfigError: output = '/dev/null/run': '/dev/null' is a file; give a folder.
    """
    return _check(Path(path), name, "folder")


def check_file(path: str | os.PathLike[str], name: str = "output") -> Path:
    """Returns the path of a file that can be written or overwritten, or refuses it; see `check_folder`.

    Raises:
        ConfigError: The path is a folder, or lies below a file, or its folder cannot be written to.

    Example:
        >>> check_file("/dev/null/report.html", "--output")
        Traceback (most recent call last):
        unmask.errors.ConfigError: --output = '/dev/null/report.html': '/dev/null' is a file; give another file.
    """
    return _check(Path(path), name, "file")


def _check(path: Path, name: str, what: str) -> Path:
    """Returns the path of a ``"file"`` or ``"folder"``, or refuses it."""
    if "\0" in str(path):
        raise ConfigError(f"{name} = {str(path)!r} is no name of a {what}; give another.")
    try:
        nearest = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    except OSError as error:  # The name may be too long, for example.
        raise ConfigError(f"{name} = {str(path)!r:.200}: {error.strerror}; give another {what}.") from error
    if what == "file" and nearest == path:
        if path.is_dir():
            raise ConfigError(f"{name} = {str(path)!r} is a folder; give the name of a file.")
        nearest = path.absolute().parent
    if not nearest.is_dir():
        article = "a" if what == "folder" else "another"
        raise ConfigError(f"{name} = {str(path)!r}: {str(nearest)!r} is a file; give {article} {what}.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} = {str(path)!r}: {str(nearest)!r} cannot be written to; give another {what}.")
    return path
