"""Says which weights a publisher sends and in which order: the table of tensors, and the places in them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unmask.gradients.wrappers import bare, memory_of, persistent_buffers, plain_names
from unmask.reading import Malformed

DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
"""The dtypes that a message can hold, by the name that it has there."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the publisher's model.

    Attributes:
        name: The tensor's name in the plain model.
        dtype: A key of `DTYPES`.
        shape: The tensor's shape.
        others: The other names of the same tensor, where it is tied.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    others: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """The number of the tensor's entries."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """The number of bytes of an entry."""
        return DTYPES[self.dtype].itemsize

    @property
    def order(self) -> tuple[int, str, str]:
        """The key by which a table is sorted: large numbers first, so that each number lies at a multiple of its size."""
        return -self.itemsize, self.dtype, self.name


Table = tuple[TensorSpec, ...]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's parameters and persistent buffers by plain name, detached; a tied one under each of its names.

    Example:
        >>> list(named_tensors(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    model = bare(model)
    plain = plain_names(model)
    with torch._C.DisableTorchFunctionSubclass():
        named = {plain(name): p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
        return named | {name: buffer.detach() for name, buffer in persistent_buffers(model).items()}


def table_of(model: nn.Module) -> Table:
    """Returns the table of a model's tensors, those of a dtype that no message holds left out.

    Example:
        >>> [spec.name for spec in table_of(nn.Linear(2, 2))]
        ['bias', 'weight']
    """
    model = bare(model)
    plain = plain_names(model)
    names: dict[object, list[str]] = {}
    kept: dict[object, Tensor] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *persistent_buffers(model).items()]
    for name, tensor in tensors:
        key = memory_of(tensor) or id(tensor)
        kept.setdefault(key, tensor)
        names.setdefault(key, []).append(plain(name))
    specs = [
        TensorSpec(names[key][0], _NAMES[tensor.dtype], tuple(tensor.shape), tuple(names[key][1:]))
        for key, tensor in kept.items()
        if tensor.dtype in _NAMES
    ]
    return tuple(sorted(specs, key=lambda spec: spec.order))


def bits_of(tensor: Tensor) -> NDArray:
    """Returns a tensor's entries as unsigned integers of the same bits: a vector in the CPU's memory.

    Example:
        >>> bits_of(torch.tensor([1.0], dtype=torch.bfloat16)).tolist()
        [16256]
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(_BITS[tensor.element_size()])


def bits_dtype(spec: TensorSpec) -> np.dtype:
    """Returns the unsigned integers, the least significant byte first, in which a message holds a tensor's entries."""
    return np.dtype(_BITS[spec.itemsize]).newbyteorder("<")


@dataclass(frozen=True, eq=False)
class Places:
    """Some entries of one tensor.

    Attributes:
        indices: (n,) int64 flat (row-major) indices, ascending.
        base: (n,) the bits of the entries before training, as unsigned integers.
    """

    indices: NDArray
    base: NDArray

    def base_at(self, some: NDArray) -> NDArray:
        """Returns the bits before training of some of the entries, by their indices, ascending."""
        return self.base[np.isin(self.indices, some, assume_unique=True)]


@dataclass(frozen=True)
class Change:
    """The difference between two supports.

    Attributes:
        removed: The indices that leave, by the tensor's number in the table.
        added: The places that join, by the tensor's number.
        whole: The numbers of the tensors that are sent whole from now on.
    """

    removed: Mapping[int, NDArray]
    added: Mapping[int, Places]
    whole: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.whole)


@dataclass(frozen=True)
class Support:
    """The weights that a publisher sends: the *places*, and the tensors that it sends whole, by number in the table.

    Attributes:
        table: The tensors of the publisher's model.
        places: The places of each tensor that has some, in the order of the table.
        whole: The numbers of the tensors that are sent whole, ascending.
    """

    table: Table
    places: Mapping[int, Places] = field(default_factory=dict)
    whole: tuple[int, ...] = ()

    def runs(self) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        """Yields the tensors that have places, in order, as runs of one dtype: (dtype, [(number, places), ...])."""
        sizes = [(number, each.indices.size) for number, each in self.places.items()]
        for dtype, run in groupby(sizes, key=lambda each: self.table[each[0]].dtype):
            yield dtype, list(run)

    def sizes(self) -> tuple[int, int]:
        """Returns how many bytes a message has for the places, and for the whole tensors."""
        placed = sum(self.table[number].itemsize * each.indices.size for number, each in self.places.items())
        return placed, sum(self.table[number].itemsize * self.table[number].numel for number in self.whole)

    def digest(self) -> bytes:
        """Returns the SHA-256 over the base values at all places, in order."""
        sha = hashlib.sha256()
        for number, each in self.places.items():
            sha.update(each.base.astype(bits_dtype(self.table[number]), copy=False).data)
        return sha.digest()

    def since(self, old: Support) -> Change:
        """Returns the change that makes this support of an older one of the same table."""
        removed, added = {}, {}
        for number in sorted(old.places.keys() | self.places.keys()):
            before, after = old.places.get(number), self.places.get(number)
            if before is None and after is not None:
                added[number] = after
            elif after is None and before is not None:
                removed[number] = before.indices
            elif before is None or after is None or before is after:
                continue
            elif not np.array_equal(before.indices, after.indices):
                gone = np.setdiff1d(before.indices, after.indices, assume_unique=True)
                fresh = ~np.isin(after.indices, before.indices, assume_unique=True)
                if gone.size:
                    removed[number] = gone
                if fresh.any():
                    added[number] = Places(after.indices[fresh], after.base[fresh])
        return Change(removed, added, tuple(sorted(set(self.whole) - set(old.whole))))

    def after(self, change: Change) -> Support:
        """Returns the support after a change.

        Raises:
            Malformed: A place leaves that is not there, or joins that is there already.
        """
        places = dict(self.places)
        for number, gone in change.removed.items():
            held = places.pop(number, None)
            inside = None if held is None else np.isin(held.indices, gone, assume_unique=True)
            if held is None or inside is None or np.count_nonzero(inside) != gone.size:
                raise Malformed(f"a place of {self.table[number].name!r} leaves that was not there")
            if not inside.all():
                places[number] = Places(held.indices[~inside], held.base[~inside])
        for number, new in change.added.items():
            held = places.get(number, Places(new.indices[:0], new.base[:0]))
            indices = np.concatenate([held.indices, new.indices])
            order = indices.argsort(kind="stable")
            indices = indices[order]
            if (np.diff(indices) <= 0).any():
                raise Malformed(f"a place of {self.table[number].name!r} joins that was there already")
            places[number] = Places(indices, np.concatenate([held.base, new.base])[order])
        if set(change.whole) & set(self.whole):
            raise Malformed("a tensor is to be sent whole that is sent whole already")
        whole = tuple(sorted({*self.whole, *change.whole}))
        if both := places.keys() & set(whole):
            raise Malformed(f"{self.table[min(both)].name!r} is sent whole and in part")
        return Support(self.table, dict(sorted(places.items())), whole)
