"""A selection's state on disk: what a checkpoint of O(B) bytes holds. Safetensors and JSON, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.errors import SelectionError
from unmask.files import read_tensors, write_tensors

_GROUPS = ("dense", "buffers")  # mappings of tensors inside the state


def write_state(state: Mapping[str, Any], path: str | Path) -> Path:
    """Writes ``selection.state_dict()`` to one file, atomically."""
    tensors = {key: value.cpu() for key, value in state.items() if isinstance(value, Tensor)}
    for group in _GROUPS:
        tensors |= {f"{group}::{name}": value.cpu().contiguous() for name, value in state[group].items()}
    header = {key: value for key, value in state.items() if key not in tensors and key not in _GROUPS}
    return write_tensors(Path(path), tensors, header)


def read_state(path: str | Path) -> dict[str, Any]:
    """Reads what `write_state` wrote, for ``selection.load_state_dict``.

    Raises:
        SelectionError: No such file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise SelectionError(f"there is no selection state at {str(path)!r}.")
    try:
        tensors, header = read_tensors(path)
    except ValueError as error:
        raise SelectionError(f"{str(path)!r} is no readable selection state: {error}.") from error
    state: dict[str, Any] = dict(header) | {group: {} for group in _GROUPS}
    for key, tensor in tensors.items():
        group, sign, name = key.partition("::")
        if sign:
            state[group][name] = tensor
        else:
            state[key] = tensor
    return state
