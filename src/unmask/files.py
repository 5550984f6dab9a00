"""Writing safetensors files atomically, with JSON in their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unmask.writing import replacing

_KEY = "unmask"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Writes tensors and a JSON header to one file, by way of a temporary file beside it; returns the path."""
    with replacing(path) as part:
        save_file(dict(tensors), part, metadata={_KEY: json.dumps(header, sort_keys=True)})
    return path


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Reads a file of `write_tensors`: its tensors and its header.

    Raises:
        ValueError: Not safetensors, truncated, or without a readable header.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"it cannot be read as safetensors ({error}), so it is truncated or damaged") from error
    if text is None:
        raise ValueError(f"it is a safetensors file of something else (it lacks the {_KEY!r} metadata)")
    return tensors, json.loads(text)  # JSONDecodeError is a ValueError
