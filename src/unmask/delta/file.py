"""Writes and reads a delta's file: safetensors, with JSON metadata and a checksum over everything.

Each tensor that is changed in part has ``<name>::indices`` (int32 where it has fewer than 2^31 entries, else int64) and
``<name>::values``, and ``<name>::slots`` (int32 or int64) where the order of unmasking is kept. Each tensor that is stored whole
has ``<name>::whole``. A name with indices, values and whole is a tensor that the base lacks: its values replace entries of
the whole. Such a file has format version 2; any other file is still written as version 1. The safetensors metadata holds
one entry, ``unmask``: JSON with the format version, the shapes, the base's fingerprint, the user's metadata, and a SHA-256 over
all of these and the tensors' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.delta.provenance import METADATA
from unmask.delta.sparse import SparseTensor
from unmask.errors import DeltaError
from unmask.files import checksum, read_tensors
from unmask.reading import Malformed, bounded, count, fields, items, mapping, refusing, text

FORMAT_VERSION = 2
INDICES, VALUES, WHOLE, SLOTS = "::indices", "::values", "::whole", "::slots"

Contents = tuple[dict[str, SparseTensor], dict[str, Tensor], str, dict[str, Any]]  # sparse, whole, base, metadata


def read(path: Path) -> Contents:
    """Reads a delta and checks every byte of it; see `unpack`."""
    if not path.is_file():
        raise DeltaError(f"there is no delta at {str(path)!r}; give the path of a .safetensors file that unmask wrote.")
    with refusing(DeltaError, f"{str(path)!r} is no readable unmask delta: it", _ANOTHER):
        tensors, header = read_tensors(path)
    return unpack(tensors, header, repr(str(path)))


def pack(
    sparse: Mapping[str, SparseTensor], whole: Mapping[str, Tensor], base: str, metadata: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the header of the file of a delta with these fields.

    Raises:
        DeltaError: The metadata are no JSON values, or a known entry of them has another form than a reader expects.
    """
    tensors: dict[str, Tensor] = {}
    order = torch.int32 if sum(entry.numel for entry in sparse.values()) < 2**31 else torch.int64
    for name, entry in sparse.items():
        flat = torch.int32 if torch.Size(entry.shape).numel() < 2**31 else torch.int64
        tensors[name + INDICES] = entry.indices.cpu().to(flat).contiguous()
        tensors[name + VALUES] = entry.values.cpu().contiguous()
        if entry.slots is not None:
            tensors[name + SLOTS] = entry.slots.cpu().to(order).contiguous()
    tensors |= {name + WHOLE: tensor.cpu().contiguous().clone() for name, tensor in whole.items()}
    header = {
        "format_version": FORMAT_VERSION if sparse.keys() & whole.keys() else 1,
        "base": base,
        "shapes": {name: list(entry.shape) for name, entry in sparse.items()},
        "metadata": dict(metadata),
    }
    with refusing(DeltaError, "the delta's metadata", "Give JSON values."):
        METADATA(bounded(header["metadata"]), "metadata")
        try:
            header["checksum"] = checksum(header, tensors)
        except (TypeError, ValueError) as error:  # a tensor among the metadata, say
            raise Malformed(str(error)) from error
    return tensors, header


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any], source: str) -> Contents:
    """Returns what `pack` got: sparse, whole, base and metadata. Error texts name the ``source`` of the file's content.

    Raises:
        DeltaError: The file has another format version, was altered, or is not of the form that `pack` makes.
    """
    with refusing(DeltaError, f"{source} is no readable unmask delta: it", _ANOTHER):
        fields({"format_version": count, "checksum": text})(header, "the header")
        if header["format_version"] not in range(1, FORMAT_VERSION + 1):
            raise DeltaError(
                f"{source} has format version {header['format_version']}; this unmask reads up to {FORMAT_VERSION}. Update "
                "unmask."
            )
        if checksum(header, tensors) != header["checksum"]:
            raise DeltaError(f"{source} fails its checksum: it was altered after unmask wrote it. Take another copy.")
        _HEADER(header, "the header")
        shapes = header["shapes"]
        needed = {name + kind for name in shapes for kind in (INDICES, VALUES)}
        slots = {name: tensors[name + SLOTS].long() for name in shapes if name + SLOTS in tensors}
        whole = {key.removesuffix(WHOLE): tensor for key, tensor in tensors.items() if key.endswith(WHOLE)}
        known = needed | {name + SLOTS for name in slots} | {name + WHOLE for name in whole}
        for key in sorted(needed - tensors.keys()):
            raise Malformed(f"it lacks the tensor {key!r}")
        for key in sorted(tensors.keys() - known):
            raise Malformed(f"it holds a tensor {key!r} that belongs to nothing")
        for key, tensor in tensors.items():
            if key.endswith((INDICES, SLOTS)) and key in known and tensor.dtype not in (torch.int32, torch.int64):
                raise Malformed(f"{key!r} is {tensor.dtype} and must be int32 or int64")
    sparse = {
        name: SparseTensor(tensors[name + INDICES].long(), tensors[name + VALUES], tuple(shape), slots.get(name))
        for name, shape in shapes.items()
    }
    return sparse, whole, header["base"], header["metadata"]


_ANOTHER = "Take another copy."
_HEADER = fields(
    {"format_version": count, "base": text, "shapes": mapping(items(count)), "metadata": METADATA, "checksum": text},
    closed=True,
)
