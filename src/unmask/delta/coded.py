"""Packs a delta into few bytes: format 3. ``docs/delta.md`` specifies it, so that a program in another language can read it.

The tensor ``header`` is JSON that zlib has compressed: all that is no tensor, with a column for each fact about the tensors that
are changed in part, in the order of their names. ``indices`` has the codes of their indices (`unmask.delta.rice`), one after the
other; a random mask has its seed in the header instead (`unmask.delta.drawn`). ``values.<dtype>`` has the values of all tensors
of a dtype, and ``slots`` the order of unmasking where it is kept. Tensors that are stored whole are ``<name>::whole``.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.delta.drawn import Draw
from unmask.delta.plain import Contents, check_keys, pack_whole, shape, slots_dtype, unpack_whole
from unmask.delta.provenance import METADATA
from unmask.delta.rice import decode, encode
from unmask.delta.sparse import SparseTensor
from unmask.files import MOST_HEADER
from unmask.reading import Malformed, count, fields, integer, items, one_of, parse_json, text

HEADER = "header"
_INDICES, _SLOTS, _VALUES = "indices", "slots", "values."
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def pack(
    sparse: Mapping[str, SparseTensor],
    whole: Mapping[str, Tensor],
    base: str,
    metadata: Mapping[str, Any],
    places: str,
    draw: Draw | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the header, without its checksum, of the file of a delta with these fields."""
    names = sorted(sparse)
    entries = [sparse[name] for name in names]
    dtypes = [str(entry.values.dtype).removeprefix("torch.") for entry in entries]
    shapes = {name: list(sparse[name].shape) for name in names}
    header: dict[str, Any] = {"base": base, "metadata": dict(metadata)}
    header |= {"names": names, "shapes": list(shapes.values()), "dtypes": dtypes}
    tensors = pack_whole(whole)
    digest = None if draw is None else draw.digest_of(sparse)
    if draw is not None and digest is not None:
        header["draw"] = {"seed": draw.seed, "total": draw.total, "skipped": draw.skipped(shapes), "sha256": digest}
    else:
        codes = [encode(entry.indices.cpu().long().numpy(), math.prod(entry.shape)) for entry in entries]
        header["counts"] = [entry.numel for entry in entries]
        header["parameters"] = [parameter for _, parameter in codes]
        header["lengths"] = [code.size for code, _ in codes]
        tensors[_INDICES] = torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *(code for code, _ in codes)]))
    for dtype in sorted({*dtypes}):
        parts = [entry.values.cpu() for entry, own in zip(entries, dtypes, strict=True) if own == dtype]
        tensors[_VALUES + dtype] = torch.cat(parts)
    slots = [entry.slots.cpu() for entry in entries if entry.slots is not None]
    if slots:
        tensors[_SLOTS] = torch.cat(slots).to(slots_dtype(sparse))
    if places:
        header["places"] = places
    packed = zlib.compress(json.dumps(header, sort_keys=True, separators=(",", ":")).encode(), 9)
    tensors[HEADER] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    return tensors, {"format_version": 3}


def unpack(tensors: Mapping[str, Tensor], outer: Mapping[str, Any]) -> Contents:
    """Returns what `pack` got. It takes memory in proportion to the file, and to a header that is within bounds.

    Raises:
        Malformed: The tensors are not of the form that `pack` makes.
    """
    fields({"format_version": count, "checksum": text}, closed=True)(outer, "the header")
    _check_vector(tensors, HEADER, torch.uint8)
    header = _inflated(tensors[HEADER].numpy().tobytes())
    _HEADER(header, "the header")
    names, shapes, dtypes = (header[column] for column in _COLUMNS)
    if not len(names) == len(shapes) == len(dtypes) or any(low >= high for low, high in pairwise(names)):
        raise Malformed("its columns have different lengths, or its names do not ascend")
    kinds = {_VALUES + dtype: getattr(torch, dtype) for dtype in dtypes}
    check_keys(tensors, [HEADER, *kinds, *([] if "draw" in header else [_INDICES])], [_SLOTS])
    for key, dtype in kinds.items():
        _check_vector(tensors, key, dtype)
    total = sum(tensors[key].numel() for key in kinds)  # Nothing below takes more memory than so many values ask for.
    draw = None
    if "draw" in header:
        draw, indices = _drawn(header, total)
    else:
        _check_vector(tensors, _INDICES, torch.uint8)
        indices = _decoded(header, tensors[_INDICES].numpy(), total)
    sizes = [each.size for each in indices]
    values: dict[int, Tensor] = {}
    for key in kinds:
        own = [place for place, dtype in enumerate(dtypes) if _VALUES + dtype == key]
        values |= dict(zip(own, _split(tensors, key, [sizes[place] for place in own]), strict=True))
    slots: list[Tensor | None] = [None] * len(names)
    if _SLOTS in tensors:
        _check_vector(tensors, _SLOTS, torch.int32, torch.int64)
        slots = [part.long() for part in _split(tensors, _SLOTS, sizes)]
    sparse = {
        name: SparseTensor(torch.from_numpy(indices[place]), values[place], tuple(shapes[place]), slots[place])
        for place, name in enumerate(names)
    }
    return sparse, unpack_whole(tensors), header["base"], header["metadata"], header.get("places", ""), draw


def _inflated(data: bytes) -> dict[str, Any]:
    """Returns the header that `pack` compressed."""
    inflater = zlib.decompressobj()
    try:
        header = inflater.decompress(data, MOST_HEADER + 1)
    except zlib.error as error:
        raise Malformed(f"its header cannot be decompressed ({error})") from error
    if len(header) > MOST_HEADER:
        raise Malformed(f"its header has more than {MOST_HEADER:,} bytes, the most that are read")
    if not inflater.eof or inflater.unused_data:
        raise Malformed("its header ends too early or too late")
    return parse_json(header, MOST_HEADER)


def _check_vector(tensors: Mapping[str, Tensor], key: str, *dtypes: torch.dtype) -> None:
    """Refuses a tensor that is no vector of one of these dtypes."""
    tensor = tensors[key]
    if tensor.dtype not in dtypes or tensor.ndim != 1:
        wanted = " or ".join(map(str, dtypes))
        raise Malformed(f"{key!r} is {tensor.dtype} of shape {tuple(tensor.shape)} and must be a vector of {wanted}")


def _split(tensors: Mapping[str, Tensor], key: str, sizes: list[int]) -> list[Tensor]:
    """Returns copies of a vector's parts, one for each tensor."""
    if sum(sizes) != tensors[key].numel():
        raise Malformed(f"{key!r} has {tensors[key].numel()} entries for {sum(sizes)} indices")
    return [part.clone() for part in tensors[key].split(sizes)]


def _drawn(header: Mapping[str, Any], total: int) -> tuple[Draw, list[NDArray[np.int64]]]:
    """Returns the draw of a random mask, and the indices of its ``total`` weights by tensor."""
    said, starts, end = header["draw"], {}, 0
    if len(said["skipped"]) != len(header["names"]):
        raise Malformed("the column skipped has another length than the names")
    for name, sizes, skipped in zip(header["names"], header["shapes"], said["skipped"], strict=True):
        starts[name] = end + skipped
        end = starts[name] + math.prod(sizes)
    if end > said["total"]:
        raise Malformed(f"its tensors have {end} weights, more than the {said['total']} that it was drawn from")
    draw = Draw(said["seed"], said["total"], starts)
    indices, digest = draw.indices(total, header["names"])
    if digest != said["sha256"]:
        raise Malformed("the draw of its seed has another hash than it says")
    return draw, list(indices.values())


def _decoded(header: Mapping[str, Any], code: NDArray[np.uint8], total: int) -> list[NDArray[np.int64]]:
    """Returns the indices of ``total`` weights by tensor from their codes, one after the other."""
    lacking = [column for column in _RICE if len(header.get(column, ())) != len(header["names"])]
    if lacking:
        raise Malformed(f"the column {lacking[0]} is missing or has another length than the names")
    counts, parameters, lengths = (header[column] for column in _RICE)
    if (sum(counts), sum(lengths)) != (total, code.size):
        raise Malformed(f"it counts {sum(counts)} indices in {sum(lengths)} bytes; there are {total} in {code.size}")
    indices, end = [], 0
    for size, parameter, length, sizes in zip(counts, parameters, lengths, header["shapes"], strict=True):
        end += length
        indices.append(decode(code[end - length : end], parameter, size, math.prod(sizes)))
    return indices


_COLUMNS = {"names": items(text), "shapes": items(shape), "dtypes": items(one_of(*_DTYPES))}
_RICE = {"counts": items(count), "parameters": items(count), "lengths": items(count)}
_DRAW = fields({"seed": integer, "total": count, "skipped": items(count), "sha256": text}, closed=True)
_HEADER = fields(
    {"base": text, "metadata": METADATA, **_COLUMNS}, {"places": text, "draw": _DRAW, **_RICE}, closed=True
)
