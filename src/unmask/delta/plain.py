"""Packs a delta into plain tensors, which any reader of safetensors understands: formats 1 and 2, and 3 without compression.

Each tensor that is changed in part has ``<name>::indices`` (int32 where it has fewer than 2^31 entries, else int64) and
``<name>::values``, and ``<name>::slots`` (int32 or int64) where the order of unmasking is kept. Each tensor that is stored whole
has ``<name>::whole``. A name with indices, values and whole is a tensor that the base lacks: its values replace entries of
the whole. Such a file has format version 2, one that has ``places`` has version 3, and any other has version 1. The header
has the format version, the shapes, the base's fingerprint, the user's metadata, and a SHA-256 over all of these and the tensors'
bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.delta.drawn import Draw
from unmask.delta.provenance import METADATA
from unmask.delta.sparse import SparseTensor
from unmask.reading import Malformed, count, fields, items, mapping, text

INDICES, VALUES, WHOLE, SLOTS = "::indices", "::values", "::whole", "::slots"

Contents = tuple[dict[str, SparseTensor], dict[str, Tensor], str, dict[str, Any], str, Draw | None]
"""The fields of a delta: sparse, whole, base, metadata, places and draw."""


def pack(
    sparse: Mapping[str, SparseTensor], whole: Mapping[str, Tensor], base: str, metadata: Mapping[str, Any], places: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the header, without its checksum, of the file of a delta with these fields."""
    tensors: dict[str, Tensor] = {}
    for name, entry in sparse.items():
        flat = torch.int32 if torch.Size(entry.shape).numel() < 2**31 else torch.int64
        tensors[name + INDICES] = entry.indices.cpu().to(flat).contiguous()
        tensors[name + VALUES] = entry.values.cpu().contiguous()
        if entry.slots is not None:
            tensors[name + SLOTS] = entry.slots.cpu().to(slots_dtype(sparse)).contiguous()
    header = {
        "format_version": 3 if places else 2 if sparse.keys() & whole.keys() else 1,
        "base": base,
        "shapes": {name: list(entry.shape) for name, entry in sparse.items()},
        "metadata": dict(metadata),
    }
    return tensors | pack_whole(whole), header | ({"places": places} if places else {})


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Contents:
    """Returns what `pack` got.

    Raises:
        Malformed: The tensors and the header are not of the form that `pack` makes.
    """
    _HEADER(header, "the header")
    shapes = header["shapes"]
    needed = {name + kind for name in shapes for kind in (INDICES, VALUES)}
    slots = {name: tensors[name + SLOTS] for name in shapes if name + SLOTS in tensors}
    check_keys(tensors, needed, [name + SLOTS for name in slots])
    for key, tensor in tensors.items():
        if key.endswith((INDICES, SLOTS)) and tensor.dtype not in (torch.int32, torch.int64):
            raise Malformed(f"{key!r} is {tensor.dtype} and must be int32 or int64")
    sparse = {
        name: SparseTensor(
            tensors[name + INDICES].long(),
            tensors[name + VALUES],
            tuple(size),
            slots[name].long() if name in slots else None,
        )
        for name, size in shapes.items()
    }
    return sparse, unpack_whole(tensors), header["base"], header["metadata"], header.get("places", ""), None


def pack_whole(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that are stored whole by their keys in the file."""
    return {name + WHOLE: tensor.cpu().contiguous().clone() for name, tensor in whole.items()}


def unpack_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a file that are stored whole, by name."""
    return {key.removesuffix(WHOLE): tensor for key, tensor in tensors.items() if key.endswith(WHOLE)}


def slots_dtype(sparse: Mapping[str, SparseTensor]) -> torch.dtype:
    """Returns the dtype in which a file stores slots."""
    return torch.int32 if sum(entry.numel for entry in sparse.values()) < 2**31 else torch.int64


def check_keys(tensors: Mapping[str, Tensor], needed: Iterable[str], optional: Iterable[str]) -> None:
    """Refuses a file that lacks a tensor, or that has one which is neither known nor stored whole."""
    needed = set(needed)
    for key in sorted(needed - tensors.keys()):
        raise Malformed(f"it lacks the tensor {key!r}")
    for key in sorted(tensors.keys() - needed - set(optional)):
        if not key.endswith(WHOLE):
            raise Malformed(f"it holds a tensor {key!r} that belongs to nothing")


def shape(value: Any, where: str) -> list[int]:
    """Accepts the shape of a tensor. A longer list would take too long to multiply."""
    if len(items(count)(value, where)) > 64:
        raise Malformed(f"{where} has {len(value)} dimensions; at most 64 are read")
    return value


_HEADER = fields(
    {"format_version": count, "base": text, "shapes": mapping(shape), "metadata": METADATA, "checksum": text},
    {"places": text},
    closed=True,
)
