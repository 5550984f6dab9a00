"""Codes the indices of many tensors as one vector of bytes, with a column for each fact about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.delta.rice import decode, encode
from unmask.delta.sparse import FLOATS
from unmask.reading import Malformed, count, items, one_of

COLUMNS = {"counts": items(count), "parameters": items(count), "lengths": items(count)}
"""The columns and their forms: how many indices, the Rice parameter, and how many bytes."""
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOATS}
DTYPE = one_of(*_NAMES.values())
"""The form of the name of a dtype."""


def dtype_name(values: Tensor) -> str:
    """Returns the name of a tensor's dtype in a file.

    Example:
        >>> dtype_name(torch.zeros(1, dtype=torch.bfloat16))
        'bfloat16'
    """
    return _NAMES[values.dtype]


def encode_all(indices: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> tuple[dict[str, list[int]], Tensor]:
    """Returns the columns, and the codes of all indices: (bytes,) uint8.

    Example:
        >>> columns, code = encode_all([torch.tensor([2, 9, 11])], [(4, 5)])
        >>> columns, decode_all(columns, code, [(4, 5)], [3])[0].tolist()
        ({'counts': [3], 'parameters': [1], 'lengths': [2]}, [2, 9, 11])
    """
    coded = [encode(each.cpu().long().numpy(), math.prod(shape)) for each, shape in zip(indices, shapes, strict=True)]
    columns = {
        "counts": [each.numel() for each in indices],
        "parameters": [parameter for _, parameter in coded],
        "lengths": [code.size for code, _ in coded],
    }
    return columns, torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *(code for code, _ in coded)]))


def decode_all(
    columns: Mapping[str, Any], code: Tensor, shapes: Sequence[Sequence[int]], most: Sequence[int]
) -> list[NDArray[np.int64]]:
    """Returns the indices of each tensor, of which there are at most ``most``. It takes memory in proportion to these.

    Raises:
        Malformed: The columns or the code are not what `encode_all` gives for tensors of these shapes.
    """
    counts, parameters, lengths = (column_of(columns, name, len(shapes)) for name in COLUMNS)
    check_vector("indices", code, torch.uint8)
    if sum(lengths) != code.numel():
        raise Malformed(f"it counts {sum(counts)} indices in {sum(lengths)} bytes; there are {code.numel()} bytes")
    found, end = [], 0
    for size, parameter, length, shape, limit in zip(counts, parameters, lengths, shapes, most, strict=True):
        if size > limit:
            raise Malformed(f"it counts {size} weights where there are at most {limit}")
        end += length
        found.append(decode(code.numpy()[end - length : end], parameter, size, math.prod(shape)))
    return found


def column_of(columns: Mapping[str, Any], name: str, length: int) -> list[int]:
    """Returns a column, or raises `Malformed` if it is missing or has another length."""
    if len(columns.get(name, ())) != length:
        raise Malformed(f"the column {name} is missing or has another length than the names")
    return list(columns[name])


def check_vector(key: str, tensor: Tensor, *dtypes: torch.dtype, size: int | None = None) -> None:
    """Refuses a tensor that is no vector of one of these dtypes, or of another size."""
    if tensor.dtype not in dtypes or tensor.ndim != 1 or size not in (None, tensor.numel()):
        wanted = " or ".join(map(str, dtypes)) + ("" if size is None else f" of {size} entries")
        raise Malformed(f"{key!r} is {tensor.dtype} of shape {tuple(tensor.shape)} and must be a vector of {wanted}")


def split_by_dtype(
    tensors: Mapping[str, Tensor], start: str, dtypes: Sequence[str], sizes: Sequence[int]
) -> list[Tensor]:
    """Returns copies of each tensor's part of the vectors ``<start><dtype>``, in which those of one dtype lie in order.

    Raises:
        Malformed: A vector has another dtype or size.
    """
    parts: dict[int, Tensor] = {}
    for dtype in {*dtypes}:
        own = [place for place, other in enumerate(dtypes) if other == dtype]
        counts, vector = [sizes[place] for place in own], tensors[start + dtype]
        check_vector(start + dtype, vector, getattr(torch, dtype))
        if vector.numel() != sum(counts):
            raise Malformed(f"{start + dtype!r} has {vector.numel()} entries for {sum(counts)} indices")
        parts |= {place: part.clone() for place, part in zip(own, vector.split(counts), strict=True)}
    return [parts[place] for place in range(len(dtypes))]
