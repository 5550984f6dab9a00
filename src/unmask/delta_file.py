"""The delta's file: safetensors, with JSON metadata and a checksum over everything.

Tensors: ``<name>::indices`` (int32 where the tensor has fewer than 2^31 entries, else int64) and ``<name>::values`` for
each tensor changed in part; ``<name>::slots`` (as the indices) beside them where the order of unmasking is kept;
``<name>::whole`` for each tensor stored whole. A name with indices, values and whole is a tensor that the base
lacks: the values lie over the whole. Such a file has format version 2; any other is still written as version 1. The
safetensors metadata holds one entry, ``unmask``: JSON with the format version, shapes, the base's fingerprint, the user's
metadata, and a SHA-256 over all of these and the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.delta import FORMAT_VERSION, SparseDelta, SparseTensor
from unmask.errors import DeltaError
from unmask.files import read_tensors, write_tensors
from unmask.fingerprint import tensor_bytes

INDICES, VALUES, WHOLE, SLOTS = "::indices", "::values", "::whole", "::slots"


def write(delta: SparseDelta, path: Path) -> Path:
    """Writes a delta to ``path``, atomically."""
    return write_tensors(path, *pack(delta))


def read(path: Path) -> SparseDelta:
    """Reads a delta and checks every byte of it."""
    if not path.is_file():
        raise DeltaError(f"there is no delta at {str(path)!r}; give the path of a .safetensors file that unmask wrote.")
    try:
        tensors, header = read_tensors(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaError(f"{str(path)!r} is no readable unmask delta: {error}. Take another copy.") from error
    return unpack(tensors, header, repr(str(path)))


def pack(delta: SparseDelta) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A delta as the tensors and the header of its file."""
    tensors: dict[str, Tensor] = {}
    for name, entry in delta.sparse.items():
        numel = torch.Size(entry.shape).numel()
        tensors[name + INDICES] = entry.indices.cpu().to(torch.int32 if numel < 2**31 else torch.int64).contiguous()
        tensors[name + VALUES] = entry.values.cpu().contiguous()
        if entry.slots is not None:
            tensors[name + SLOTS] = (
                entry.slots.cpu().to(torch.int32 if len(delta) < 2**31 else torch.int64).contiguous()
            )
    for name, tensor in delta.whole.items():
        tensors[name + WHOLE] = tensor.cpu().contiguous().clone()
    header = {
        "format_version": FORMAT_VERSION if delta.overlaid else 1,
        "base": delta.base,
        "shapes": {name: list(entry.shape) for name, entry in delta.sparse.items()},
        "metadata": dict(delta.metadata),
    }
    header["checksum"] = _checksum(header, tensors)
    return tensors, header


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any], source: str) -> SparseDelta:
    """The delta that `pack` took apart.

    Args:
        tensors: Its tensors.
        header: Its header.
        source: Where they come from, for error texts.

    Raises:
        DeltaError: Another format version, or anything was altered.
    """
    try:
        version, expected = header["format_version"], header["checksum"]
    except (KeyError, TypeError) as error:
        raise DeltaError(f"{source} is no readable unmask delta: {error}. Take another copy.") from error
    if version not in range(1, FORMAT_VERSION + 1):
        raise DeltaError(
            f"{source} has format version {version!r}; this unmask reads up to {FORMAT_VERSION}. Update unmask."
        )
    if _checksum(header, tensors) != expected:
        raise DeltaError(f"{source} fails its checksum: it was altered after unmask wrote it. Take another copy.")
    slots = {key.removesuffix(SLOTS): tensor.long() for key, tensor in tensors.items() if key.endswith(SLOTS)}
    sparse = {
        name: SparseTensor(tensors[name + INDICES].long(), tensors[name + VALUES], tuple(shape), slots.get(name))
        for name, shape in header["shapes"].items()
    }
    whole = {key.removesuffix(WHOLE): tensor for key, tensor in tensors.items() if key.endswith(WHOLE)}
    return SparseDelta(sparse, whole, header["base"], header["metadata"])


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "checksum"}, sort_keys=True).encode())
    for key in sorted(tensors):
        sha.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        sha.update(tensor_bytes(tensors[key]))
    return sha.hexdigest()
