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

from unmask.delta.codes import COLUMNS as CODED
from unmask.delta.codes import DTYPE, check_vector, column_of, decode_all, dtype_name, encode_all, split_by_dtype
from unmask.delta.drawn import Draw
from unmask.delta.plain import Contents, check_keys, pack_whole, shape, slots_dtype, unpack_whole
from unmask.delta.provenance import METADATA
from unmask.delta.sparse import SparseTensor
from unmask.files import MOST_HEADER
from unmask.reading import Malformed, count, fields, integer, items, parse_json, text

HEADER = "header"
_INDICES, _SLOTS, _VALUES = "indices", "slots", "values."


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
    dtypes = [dtype_name(entry.values) for entry in entries]
    header: dict[str, Any] = {"base": base, "metadata": dict(metadata)}
    header |= {"names": names, "shapes": [list(entry.shape) for entry in entries], "dtypes": dtypes}
    tensors = pack_whole(whole)
    drawn = None if draw is None else draw.to_json(sparse)
    if drawn is not None:
        header["draw"] = drawn
    else:
        columns, tensors[_INDICES] = encode_all([entry.indices for entry in entries], header["shapes"])
        header |= columns
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
    check_vector(HEADER, tensors[HEADER], torch.uint8)
    header = _inflated(tensors[HEADER].numpy().tobytes())
    _HEADER(header, "the header")
    names, shapes, dtypes = (header[column] for column in _COLUMNS)
    if not len(names) == len(shapes) == len(dtypes) or any(low >= high for low, high in pairwise(names)):
        raise Malformed("its columns have different lengths, or its names do not ascend")
    kinds = {_VALUES + dtype for dtype in dtypes}
    check_keys(tensors, [HEADER, *kinds, *([] if "draw" in header else [_INDICES])], [_SLOTS])
    total = sum(tensors[key].numel() for key in kinds)  # Nothing below takes more memory than so many values ask for.
    draw = None
    if "draw" in header:
        draw, indices = _drawn(header, total)
    else:
        counts = column_of(header, "counts", len(names))
        if sum(counts) != total:
            raise Malformed(f"it counts {sum(counts)} indices for {total} values")
        indices = decode_all(header, tensors[_INDICES], shapes, counts)
    sizes = [each.size for each in indices]
    values = split_by_dtype(tensors, _VALUES, dtypes, sizes)
    slots: list[Tensor | None] = [None] * len(names)
    if _SLOTS in tensors:
        check_vector(_SLOTS, tensors[_SLOTS], torch.int32, torch.int64, size=sum(sizes))
        slots = [part.long() for part in tensors[_SLOTS].split(sizes)]
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


_COLUMNS = {"names": items(text), "shapes": items(shape), "dtypes": items(DTYPE)}
_DRAW = fields({"seed": integer, "total": count, "skipped": items(count), "sha256": text}, closed=True)
_HEADER = fields(
    {"base": text, "metadata": METADATA, **_COLUMNS}, {"places": text, "draw": _DRAW, **CODED}, closed=True
)
