"""A selection's state on disk: what a checkpoint of O(B) bytes holds. Safetensors and JSON with a checksum, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.errors import SelectionError
from unmask.files import checksum, read_tensors, write_tensors
from unmask.reading import Malformed, fields, plain, refusing, text

_GROUPS = ("dense", "buffers")  # mappings of tensors inside the state
_VALUES = ("version", "method", "budget", "names", "shapes", "step", "used")
_TENSORS = ("values", "base", "positions", "picked")


def write_state(state: Mapping[str, Any], path: str | Path) -> Path:
    """Writes ``selection.state_dict()`` to one file, atomically, with a checksum over all of it.

    Raises:
        WriteError: The disk is full, or the file cannot be written there; what was there before is kept.
    """
    tensors = {key: value.cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    for group in _GROUPS:
        tensors |= {f"{group}::{name}": value.cpu().contiguous() for name, value in state[group].items()}
    header = {key: value for key, value in state.items() if key not in tensors and key not in _GROUPS}
    return write_tensors(Path(path), tensors, header | {"checksum": checksum(header, tensors)})


def read_state(path: str | Path) -> dict[str, Any]:
    """Reads what `write_state` wrote, for ``selection.load_state_dict``.

    A file of an earlier version, which has no checksum, is read too.

    Raises:
        SelectionError: No such file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise SelectionError(f"there is no selection state at {str(path)!r}.")
    with refusing(SelectionError, f"{str(path)!r} is no readable selection state: it", "Take another checkpoint."):
        tensors, header = read_tensors(path)
        _check(fields({}, {"checksum": text})(header, "the header"), tensors)
        state: dict[str, Any] = {key: value for key, value in header.items() if key != "checksum"}
        state |= {group: {} for group in _GROUPS}
        for key, tensor in tensors.items():
            group, sign, name = key.partition("::")
            if sign and group in _GROUPS:
                state[group][name] = tensor
            elif key in header or key in _GROUPS or sign:
                raise Malformed(f"it holds a tensor {key!r} that belongs to nothing")
            else:
                state[key] = tensor
    return state


def _check(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if "checksum" in header:
        if checksum(header, tensors) != header["checksum"]:
            raise Malformed("it fails its checksum, so it was altered after unmask wrote it")
        return
    # of a version that wrote none, and these entries alone
    fields(dict.fromkeys(_VALUES, plain), closed=True)(header, "the header")
    alone = {key for key in tensors if "::" not in key}
    for key in sorted(alone - {*_TENSORS}):
        raise Malformed(f"it holds a tensor {key!r} that belongs to nothing")
