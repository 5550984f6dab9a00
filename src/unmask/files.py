"""Safetensors files with JSON in their metadata: written whole or not at all, read within bounds, signed by a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unmask.errors import writing_to
from unmask.fingerprint import tensor_bytes
from unmask.reading import MOST_VALUES, Malformed, parse_json
from unmask.writing import replacing

_KEY = "unmask"
MOST_HEADER = 32 * 2**20
"""The longest header that is read, in bytes: that of a delta of about 80,000 tensors."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Writes tensors and a JSON header to one file, by way of a temporary file beside it; returns the path.

    Raises:
        WriteError: The disk is full, or the file cannot be written there; what was there before is kept.
    """
    with writing_to(path), replacing(path) as part:
        save_file(dict(tensors), part, metadata={_KEY: json.dumps(header, sort_keys=True)})
    return path


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Reads a file of `write_tensors`: its tensors and its header.

    Raises:
        Malformed: Not safetensors, truncated, larger than what is ever written, or without a readable header.
    """
    try:
        _check_size(path)
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except Malformed:
        raise
    except Exception as error:  # of the library, of many classes, and always of the file
        raise Malformed(f"it cannot be read as safetensors ({error}), so it is truncated or damaged") from error
    if text is None:
        raise Malformed(f"it is a safetensors file of something else (it lacks the {_KEY!r} metadata)")
    return tensors, parse_json(text, MOST_HEADER)


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a header, but its own entry ``"checksum"``, and over the tensors' names, dtypes, shapes and bytes."""
    sha = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "checksum"}, sort_keys=True).encode())
    for key in sorted(tensors):
        sha.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        sha.update(tensor_bytes(tensors[key]))
    return sha.hexdigest()


def _check_size(path: Path) -> None:
    """Refuses a header that is larger than any of ours, before anything is made of it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise Malformed("it is shorter than its header says, so it is truncated or damaged")
        if length > MOST_HEADER:
            raise Malformed(f"its header has {length:,} bytes; at most {MOST_HEADER:,} are read")
        header = file.read(length)
    held = sum(header.count(sign) for sign in (b"[", b"{", b","))
    if held > MOST_VALUES:
        raise Malformed(f"its header has about {held:,} values; at most {MOST_VALUES:,} are read")
