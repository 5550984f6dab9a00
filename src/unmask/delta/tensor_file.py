"""Reads and writes safetensors files one tensor at a time, so that a file of any size needs the memory of its largest tensor.

The library `safetensors` maps a file into memory to read it, and needs all tensors at once to write it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.errors import DeltaError
from unmask.files import safetensors_header, tensor_bytes
from unmask.reading import Malformed, count, fields, items, mapping, parse_json, plain, shown, text

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
DTYPES = {code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)}
"""The dtypes by their codes in a safetensors file, in the library's order. An older torch lacks some."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of a checkpoint, which is in memory only after it was read.

    Attributes:
        dtype: The tensor's dtype.
        shape: The tensor's shape.
        read: Returns the tensor, on the CPU. The caller must not write into it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Any]:
    """Returns a safetensors file's header: an entry for each tensor, and ``"__metadata__"`` in some files.

    Raises:
        Malformed: The file cannot be read, or is no safetensors file.
    """
    return mapping(plain)(parse_json(safetensors_header(path)), "its header")


def read_layout(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Returns the tensors of a safetensors file by name, unread, and the file's metadata.

    Raises:
        Malformed: The file cannot be read, is no safetensors file or is truncated, or has a dtype that torch lacks.
    """
    raw = safetensors_header(path)
    header = mapping(plain)(parse_json(raw), "its header")
    metadata = mapping(text)(header.pop("__metadata__", {}), "its metadata")
    data = 8 + len(raw)
    size = path.stat().st_size - data
    tensors = {}
    for name, entry in header.items():
        entry = _ENTRY(entry, f"the tensor {name!r}")
        if entry["dtype"] not in DTYPES:
            raise Malformed(f"the tensor {name!r} has dtype {shown(entry['dtype'])}; known are {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        # A long shape is refused before its sizes are multiplied, and one that torch cannot stride also if it has no entry.
        if len(shape) > _MOST_SIZES or math.prod(max(1, length) for length in shape) >= 2**63:
            raise Malformed(f"the tensor {name!r} has shape {shown(shape)}, which no tensor has")
        start, end = entry["data_offsets"] if len(entry["data_offsets"]) == 2 else (0, -1)
        if end - start != math.prod(shape) * dtype.itemsize or end > size:
            offsets = shown(entry["data_offsets"])
            raise Malformed(f"the bytes {offsets} of the tensor {name!r} do not fit its shape or the file")
        tensors[name] = LazyTensor(dtype, shape, partial(_read, path, data + start, dtype, shape))
    return tensors, metadata


_MOST_SIZES = 64  # of a tensor in torch
_ENTRY = fields({"dtype": text, "shape": items(count), "data_offsets": items(count)})


def _read(path: Path, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Reads one tensor, whose bytes begin at ``start``."""
    data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    try:
        with path.open("rb") as file:
            file.seek(start)
            found = file.readinto(memoryview(data.numpy()))  # type: ignore[arg-type]
    except OSError as error:
        raise DeltaError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    if found != data.numel():
        raise DeltaError(f"{str(path)!r} was cut short while it was read. Take another copy.")
    return _swapped(data, dtype).view(dtype).reshape(shape)


def _swapped(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor's bytes in this machine's order; a file has the least significant byte of each number first."""
    size = dtype.itemsize // (2 if dtype.is_complex else 1)
    return data if sys.byteorder == "little" or size == 1 else data.view(-1, size).flip(1).reshape(-1)


def write_file(
    path: Path, layout: Mapping[str, LazyTensor], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, tensor by tensor.

    Args:
        path: The file, which is overwritten.
        layout: The dtype and shape of each tensor, by name.
        read: Returns a tensor by its name. It is called once for each name.
        metadata: The file's metadata.
    """
    # As the library has it, the wide dtypes come first, so that each tensor starts at a multiple of its width.
    order = sorted(layout, key=lambda name: (-_RANKS[layout[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + layout[name].nbytes
        shape = list(layout[name].shape)
        header[name] = {"dtype": _CODES[layout[name].dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            file.write(tensor_bytes(read(name)))
