"""Codes a delta as its change to another one, in few bytes and exactly; `unmask.delta.ladder` stores a series of deltas so.

An *entering* weight is set by the later delta alone, and its value is stored as it is. A *leaving* one is set by the earlier
delta alone. Of a weight that both set, the difference of the two values' bits, taken as whole numbers, is stored: a small number
where training moved the weight little. The first bytes of all these numbers come first, then all second bytes, and so on, and
zlib compresses the result.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.delta.codes import (
    COLUMNS,
    DTYPE,
    check_vector,
    column_of,
    decode_all,
    dtype_name,
    encode_all,
    split_by_dtype,
)
from unmask.delta.contents import DeltaFields, Fields
from unmask.delta.fingerprint import same_bits
from unmask.delta.plain import check_keys, shape
from unmask.delta.provenance import METADATA
from unmask.delta.sparse import SparseTensor
from unmask.gradients.entries import bits
from unmask.reading import Malformed, count, fields, items, text

_WHOLE, _CHANGE = "::whole", "::change"
_CODED = fields(COLUMNS, closed=True)
_RUNG = fields(
    {"base": text, "places": text, "metadata": METADATA, "names": items(text), "shapes": items(shape)}
    | {"dtypes": items(DTYPE), "entering": _CODED, "leaving": _CODED, "same": items(text)},
    closed=True,
)
HEADER = fields({"format_version": count, "kind": text, "checksum": text, "rungs": items(_RUNG)}, closed=True)
"""The form of a ladder's header."""


@dataclass(frozen=True)
class _Move:
    """The change of the weights that two deltas set in one tensor.

    Attributes:
        shape: The tensor's shape.
        entering: (e,) int64 indices of entering weights.
        leaving: (l,) int64 indices of leaving weights.
        values: (e,) the values of entering weights.
        old: (k,) the earlier values of the weights that both set.
        new: (k,) their later values.
        slots: (e,) int64 places of entering weights in the order of unmasking; None where the order is not kept.
    """

    shape: tuple[int, ...]
    entering: Tensor
    leaving: Tensor
    values: Tensor
    old: Tensor
    new: Tensor
    slots: Tensor | None


def pack(before: DeltaFields, after: DeltaFields) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the description, as JSON values, of the change from one delta to another.

    Raises:
        Malformed: A tensor has another shape or dtype in each, or the order of unmasking is kept in part or has changed.
    """
    names = sorted({*before.sparse, *after.sparse})
    moves = [_move(name, before.sparse.get(name), after.sparse.get(name)) for name in names]
    dtypes = [dtype_name(move.values) for move in moves]
    tensors, same = _pack_whole(before.whole, after.whole)
    described: dict[str, Any] = {"base": after.base, "places": after.places, "metadata": dict(after.metadata)}
    described |= {"names": names, "shapes": [list(move.shape) for move in moves], "dtypes": dtypes, "same": same}
    for key in ("entering", "leaving"):
        described[key], tensors[key] = encode_all([getattr(move, key) for move in moves], described["shapes"])
    for dtype in sorted({*dtypes}):
        own = [move for move, other in zip(moves, dtypes, strict=True) if other == dtype]
        tensors[f"values.{dtype}"] = torch.cat([move.values for move in own])
        old, new = torch.cat([move.old for move in own]), torch.cat([move.new for move in own])
        tensors[f"changes.{dtype}"] = _change(old, new)
    slots = [move.slots for move in moves if move.slots is not None]
    if slots:
        tensors["slots"] = torch.cat(slots)
    return tensors, described


def unpack(before: DeltaFields, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> Fields:
    """Returns the fields of the later delta, from the earlier one and what `pack` gave.

    It takes memory in proportion to the earlier delta and to the tensors.

    Raises:
        Malformed: The tensors or the description are not what `pack` gives for the earlier delta.
    """
    names, dtypes = described["names"], described["dtypes"]
    if not len(names) == len(described["shapes"]) == len(dtypes) or sorted({*names}) != names:
        raise Malformed("its columns have different lengths, or its names do not ascend")
    if before.sparse.keys() - {*names}:
        raise Malformed(f"it does not name {min(before.sparse.keys() - {*names})!r}, which the rung before it sets")
    needed = {"entering", "leaving", *(f"{kind}.{dtype}" for kind in ("values", "changes") for dtype in dtypes)}
    whole = _unpack_whole(before.whole, tensors, described["same"])
    check_keys({key: t for key, t in tensors.items() if not key.endswith(_CHANGE)}, needed, ["slots"])
    spaces = [tuple(sizes) for sizes in described["shapes"]]
    old = []
    for name, space, dtype in zip(names, spaces, dtypes, strict=True):
        entry = before.sparse.get(name) or _nothing(space, getattr(torch, dtype), "slots" in tensors)
        if entry.shape != space or entry.values.dtype != getattr(torch, dtype):
            raise Malformed(f"{name!r} has another shape or dtype than in the rung before it")
        old.append(entry)
    counts = column_of(described["entering"], "counts", len(names))
    values = split_by_dtype(tensors, "values.", dtypes, counts)
    entering, leaving = (
        [torch.from_numpy(each) for each in decode_all(described[key], tensors[key], spaces, most)]
        for key, most in (("entering", counts), ("leaving", [entry.numel for entry in old]))
    )
    stays = [~torch.isin(entry.indices, gone) for entry, gone in zip(old, leaving, strict=True)]
    if any(int((~kept).sum()) != gone.numel() for gone, kept in zip(leaving, stays, strict=True)):
        raise Malformed("a weight leaves that the rung before it does not set")
    new = [entry.values[kept] for entry, kept in zip(old, stays, strict=True)]
    for dtype in {*dtypes}:
        own = [place for place, other in enumerate(dtypes) if other == dtype]
        changed = _changed(torch.cat([new[place] for place in own]), tensors[f"changes.{dtype}"])
        for place, part in zip(own, changed.split([new[place].numel() for place in own]), strict=True):
            new[place] = part.clone()
    sizes = [part.numel() for part in values]
    slots: Sequence[Tensor | None] = [None] * len(names)
    if "slots" in tensors:
        check_vector("slots", tensors["slots"], torch.int64, size=sum(sizes))
        slots = tensors["slots"].split(sizes)
    sparse = {}
    for place, (name, entry) in enumerate(zip(names, old, strict=True)):
        indices, order = torch.cat([entry.indices[stays[place]], entering[place]]).sort()
        if indices.numel():
            found = torch.cat([new[place], values[place]])[order]
            held = slots[place]
            kept_slots = (
                None if held is None or entry.slots is None else torch.cat([entry.slots[stays[place]], held])[order]
            )
            sparse[name] = SparseTensor(indices, found, spaces[place], kept_slots)
    return sparse, whole, described["base"], described["metadata"], described["places"]


def _move(name: str, old: SparseTensor | None, new: SparseTensor | None) -> _Move:
    """Returns the change of one tensor's weights."""
    like = new if old is None else old
    assert like is not None, "one of the two sets weights of it"
    old = old or _nothing(like.shape, like.values.dtype, like.slots is not None)
    new = new or _nothing(like.shape, like.values.dtype, like.slots is not None)
    if (old.shape, old.values.dtype) != (new.shape, new.values.dtype):
        raise Malformed(f"{name!r} has another shape or dtype")
    if (old.slots is None) != (new.slots is None):
        raise Malformed("the order of unmasking is kept in one of the two alone")
    stays, enters = torch.isin(old.indices, new.indices), ~torch.isin(new.indices, old.indices)
    slots = None if new.slots is None else new.slots[enters]
    if old.slots is not None and new.slots is not None and not old.slots[stays].equal(new.slots[~enters]):
        raise Malformed(f"the order of unmasking has changed in {name!r}")
    values = new.values[enters].cpu()
    return _Move(
        tuple(like.shape),
        new.indices[enters].long().cpu(),
        old.indices[~stays].long().cpu(),
        values,
        old.values[stays].cpu(),
        new.values[~enters].cpu(),
        slots,
    )


def _nothing(shape: tuple[int, ...], dtype: torch.dtype, ordered: bool) -> SparseTensor:
    """Returns no weight of a tensor."""
    none = torch.empty(0, dtype=torch.int64)
    return SparseTensor(none, torch.empty(0, dtype=dtype), shape, none if ordered else None)


def _pack_whole(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors that store those of the later delta, and the names of those that have not changed."""
    tensors, same = {}, []
    for name, tensor in after.items():
        held = before.get(name)
        if held is not None and same_bits(held, tensor):
            same.append(name)
        elif held is not None and _comparable(held) and (held.shape, held.dtype) == (tensor.shape, tensor.dtype):
            tensors[name + _CHANGE] = _change(held, tensor)
        else:
            tensors[name + _WHOLE] = tensor.cpu().contiguous().clone()
    return tensors, sorted(same)


def _unpack_whole(
    before: Mapping[str, Tensor], tensors: Mapping[str, Tensor], same: Sequence[str]
) -> dict[str, Tensor]:
    """Returns the tensors that the later delta stores whole."""
    whole = {key.removesuffix(_WHOLE): tensor for key, tensor in tensors.items() if key.endswith(_WHOLE)}
    changed = {key.removesuffix(_CHANGE): tensor for key, tensor in tensors.items() if key.endswith(_CHANGE)}
    lacking = sorted({*same, *changed} - before.keys())
    if lacking or len(whole) + len(changed) + len(same) != len({*whole, *changed, *same}):
        raise Malformed(f"it stores {min(lacking, default='a tensor')!r} as a change of nothing, or twice")
    for name, code in changed.items():
        if not _comparable(before[name]):
            raise Malformed(f"{name!r} is {before[name].dtype}, whose changes are not coded")
        whole[name] = _changed(before[name], code)
    return whole | {name: before[name] for name in same}


def _comparable(tensor: Tensor) -> bool:
    """Returns True if a tensor's bits can be taken as one whole number for each entry."""
    return not tensor.is_complex() and tensor.element_size() <= 8


def _change(old: Tensor, new: Tensor) -> Tensor:
    """Codes the change of a tensor's values as bytes, (n,) uint8."""
    before, after = _numbers(old), _numbers(new)
    difference = after - before  # it wraps around
    # 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
    folded = (difference << 1) ^ (difference >> (8 * difference.itemsize - 1))
    little = folded.astype(folded.dtype.newbyteorder("<"))
    planes = np.ascontiguousarray(little.view(np.uint8).reshape(-1, folded.itemsize).T)
    return torch.frombuffer(bytearray(zlib.compress(planes.tobytes(), 9)), dtype=torch.uint8)


def _changed(old: Tensor, code: Tensor) -> Tensor:
    """Returns the later values, from the earlier ones and the bytes that `_change` made."""
    check_vector("change", code, torch.uint8)
    before = _numbers(old)
    inflater = zlib.decompressobj()
    try:
        planes = inflater.decompress(code.numpy().tobytes(), before.nbytes + 1)
    except zlib.error as error:
        raise Malformed(f"a change cannot be decompressed ({error})") from error
    if len(planes) != before.nbytes or not inflater.eof or inflater.unused_data:
        raise Malformed("a change has another length than the values that it changes")
    bytes_of = np.frombuffer(planes, dtype=np.uint8).reshape(before.itemsize, -1).T
    folded = np.ascontiguousarray(bytes_of).reshape(-1).view(before.dtype.newbyteorder("<")).astype(before.dtype)
    unsigned = folded.view(before.dtype.str.replace("i", "u"))
    difference = (unsigned >> 1).view(before.dtype) ^ -(folded & 1)
    return torch.from_numpy(before + difference).view(old.dtype).reshape(old.shape)


def _numbers(tensor: Tensor) -> NDArray[Any]:
    """Returns a tensor's bits as signed whole numbers, (n,)."""
    return bits(tensor.detach().cpu().contiguous()).reshape(-1).numpy()
