"""The delta's file: safetensors, with JSON metadata and a checksum over everything.

Tensors: ``<name>::indices`` (int32 where the tensor has fewer than 2^31 entries, else int64) and ``<name>::values`` for
each tensor changed in part; ``<name>::slots`` (as the indices) beside them where the order of unmasking is kept;
``<name>::whole`` for each tensor stored whole. A name with indices, values and whole is a tensor that the base
lacks: the values lie over the whole. Such a file has format version 2; any other is still written as version 1. The
safetensors metadata holds one entry, ``unmask``: JSON with the format version, shapes, the base's fingerprint, the user's
metadata, and a SHA-256 over all of these and the tensors' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.delta.delta import FORMAT_VERSION, SparseDelta, SparseTensor
from unmask.errors import DeltaError
from unmask.files import checksum, read_tensors, write_tensors
from unmask.reading import (
    Form,
    Malformed,
    bounded,
    count,
    fields,
    items,
    mapping,
    number,
    optional,
    plain,
    refusing,
    text,
)

INDICES, VALUES, WHOLE, SLOTS = "::indices", "::values", "::whole", "::slots"


def write(delta: SparseDelta, path: Path) -> Path:
    """Writes a delta to ``path``, atomically.

    Raises:
        DeltaError: The metadata are no JSON values, or not of the form that a reader of ours expects.
        WriteError: The disk is full, or the file cannot be written there; what was there before is kept.
    """
    return write_tensors(path, *pack(delta))


def read(path: Path) -> SparseDelta:
    """Reads a delta and checks every byte of it."""
    if not path.is_file():
        raise DeltaError(f"there is no delta at {str(path)!r}; give the path of a .safetensors file that unmask wrote.")
    with refusing(DeltaError, f"{str(path)!r} is no readable unmask delta: it", _ANOTHER):
        tensors, header = read_tensors(path)
    return unpack(tensors, header, repr(str(path)))


def pack(delta: SparseDelta) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A delta as the tensors and the header of its file.

    Raises:
        DeltaError: The metadata are no JSON values, or not of the form that a reader of ours expects.
    """
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
    with refusing(DeltaError, "the delta's metadata", "Give JSON values."):
        METADATA(bounded(header["metadata"]), "metadata")
        header["checksum"] = _sealed(header, tensors)
    return tensors, header


def _sealed(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    try:
        return checksum(header, tensors)
    except (TypeError, ValueError) as error:  # a tensor among the metadata, say
        raise Malformed(str(error)) from error


def unpack(tensors: Mapping[str, Tensor], header: Mapping[str, Any], source: str) -> SparseDelta:
    """The delta that `pack` took apart.

    Args:
        tensors: Its tensors.
        header: Its header.
        source: Where they come from, for error texts.

    Raises:
        DeltaError: Another format version, anything was altered, or it is not of the form that `pack` makes.
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
        slots, whole = _tensors(tensors, header["shapes"])
    sparse = {
        name: SparseTensor(tensors[name + INDICES].long(), tensors[name + VALUES], tuple(shape), slots.get(name))
        for name, shape in header["shapes"].items()
    }
    return SparseDelta(sparse, whole, header["base"], header["metadata"])


def _tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The slots and the whole tensors, by name, of just the tensors that the shapes ask for.

    Raises:
        Malformed: A tensor is missing, is of no use, or has a dtype that it is never written with.
    """
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
    return slots, whole


_ANOTHER = "Take another copy."
_INTO = {"r": count, "alpha": number, "dropout": number, "targets": items(text), "reduction": number, "seed": count}
_METHOD = {
    "name": text,
    "strategy": text,
    "parameters": mapping(plain),
    "leaving": text,
    "steps": count,
    "stride": count,
}
METADATA: Form = fields(
    {},
    {
        "method": fields({}, _METHOD),
        **dict.fromkeys(("budget", "used", "step", "parameters"), count),
        "eligible": fields({"tensors": count, "weights": count}),
        "dense": items(text),
        "base_id": optional(text),
        "versions": mapping(plain),
        "quantised": items(text),
        "into": optional(fields({"kind": text}, _INTO, closed=True)),
        "after": mapping(number),
        "checkpoint": text,
    },
)
"""The form of a delta's metadata: what a reader of ours looks at, if it is there. Any further entry is the user's."""
_HEADER = fields(
    {
        "format_version": count,
        "base": text,
        "shapes": mapping(items(count)),
        "metadata": METADATA,
        "checksum": text,
    },
    closed=True,
)
