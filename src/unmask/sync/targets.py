"""Finds where a published tensor lies in a receiver's model: under its name, in a fused tensor, or as a slice of one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unmask.delta.live import has_selection
from unmask.delta.writable import find_unwritable
from unmask.errors import SyncError
from unmask.gradients.wrappers import has_memory
from unmask.quantised.sources import sources
from unmask.sync.support import DTYPES, Table, TensorSpec, named_tensors


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that one rank of a tensor-parallel group holds: equally many rows or columns as every other rank.

    Attributes:
        dim: 0 for rows, 1 for columns.
        rank: The rank, from 0.
        ranks: The number of ranks.

    Example:
        >>> Shard(0, 1, 2).span("weight", (6, 4))
        (0, 3, 6)
    """

    dim: int
    rank: int
    ranks: int

    def span(self, name: str, shape: Sequence[int]) -> tuple[int, int, int]:
        """Returns (dim, start, stop) for a published tensor of this shape.

        Raises:
            SyncError: The tensor cannot be divided so.
        """
        if self.dim not in (0, 1) or not 0 <= self.rank < self.ranks:
            raise SyncError(f"{self} of {name!r}: dim is 0 or 1, and rank is below ranks.")
        if len(shape) <= self.dim or shape[self.dim] % self.ranks:
            raise SyncError(
                f"{name!r} has shape {tuple(shape)}, of which dimension {self.dim} cannot be divided by {self.ranks} ranks; give "
                "(dim, start, stop) instead."
            )
        size = shape[self.dim] // self.ranks
        return self.dim, self.rank * size, (self.rank + 1) * size


Shards = Mapping[str, Shard | tuple[int, int, int]]
Fused = Mapping[str, Sequence[str]]


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a published tensor, and where it lies in one tensor of the receiver.

    Attributes:
        name: The name of the receiver's tensor.
        tensor: The receiver's tensor, detached.
        shape: The published tensor's shape.
        dim: The dimension that is cut: 0 or 1.
        start: The first row or column of the published tensor that is in it.
        stop: The one after the last.
        row: The row of the receiver's tensor in which the part begins.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int
    row: int

    @property
    def is_whole(self) -> bool:
        """True if the part is the whole published tensor."""
        return not self.shape or self.stop - self.start == self.shape[self.dim]

    def inside(self, flat: NDArray) -> tuple[NDArray, NDArray | None]:
        """Finds the entries of the published tensor that are in the part.

        Args:
            flat: (n,) int64 flat indices in the published tensor, ascending.

        Returns:
            (m,) their flat indices in the receiver's tensor; (m,) their places among the given ones, or None for all of them.
        """
        if not self.shape:
            return flat, None
        inner = int(np.prod(self.shape[1:], dtype=np.int64))  # entries of a row
        if self.dim == 0:
            low, high = np.searchsorted(flat, [self.start * inner, self.stop * inner])
            local = flat[low:high] + (self.row - self.start) * inner
            return local, None if self.is_whole else np.arange(low, high)
        rest = inner // self.shape[1]  # entries of a column within a row
        row, offset = np.divmod(flat, inner)
        held = np.flatnonzero((offset >= self.start * rest) & (offset < self.stop * rest))
        width = (self.stop - self.start) * rest
        local = (row[held] + self.row) * width + offset[held] - self.start * rest
        return local, None if self.is_whole else held

    def view(self) -> Tensor:
        """Returns the part as a view of the receiver's tensor."""
        if not self.shape:
            return self.tensor
        rows = self.stop - self.start if self.dim == 0 else self.shape[0]
        return self.tensor.narrow(0, self.row, rows)

    def cut(self, published: Tensor) -> Tensor:
        """Returns the part of a whole published tensor, of its shape."""
        return published.narrow(self.dim, self.start, self.stop - self.start) if self.shape else published


class Targets:
    """The tensors of a receiver's model.

    Args:
        model: The receiver's model.
        fused: See `unmask.sync.Receiver`.
        shard: See `unmask.sync.Receiver`.

    Raises:
        SyncError: The model is quantised, has a live selection, or a pattern of ``fused`` is wrong.
    """

    def __init__(self, model: nn.Module, fused: Fused | None, shard: Shards | None) -> None:
        if quantised := sources(model):
            raise SyncError(
                f"{min(quantised)!r} is quantised in the receiver's model, so it cannot hold the trained values bit for bit. "
                "Load the model in the trainer's dtype."
            )
        if has_selection(model):
            raise SyncError("the receiver's model has a live selection; give it a copy of the base of its own.")
        self._model = model
        self._seen: list[tuple[Mapping[str, Any], str, Any]] = []  # what was where at the last `remember`
        self._fused = {_pattern(whole): (whole, list(parts)) for whole, parts in (fused or {}).items()}
        for whole, parts in self._fused.values():
            if any(part.count("*") != whole.count("*") for part in parts) or not parts:
                raise SyncError(f"fused: {whole!r} and each name in {parts} must have equally many '*'.")
        self._shard = {_pattern(name): cut for name, cut in (shard or {}).items()}

    def regions(self, table: Table) -> dict[str, list[Region]]:
        """Returns where each published tensor lies, by its name. Those that the model lacks are left out.

        Raises:
            SyncError: A tensor has another shape or dtype than the published ones, or is two of them (tied).
        """
        specs = {name: spec for spec in table for name in (spec.name, *spec.others)}
        found: dict[str, list[Region]] = {}
        tied: dict[object, list[str]] = {}
        for name, tensor in named_tensors(self._model).items():
            parts = list(self._of(name, tensor, specs))
            published = [spec.name for _, spec in parts]
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride()) if has_memory(tensor) else name
            if published and tied.setdefault(memory, published) != published:
                raise SyncError(
                    f"{name!r} is tied in the receiver's model: it would hold {' + '.join(tied[memory])!r} and "
                    f"{' + '.join(published)!r}, which the publisher's model has apart."
                )
            if published and tied[memory] is published:
                for region, spec in parts:
                    found.setdefault(spec.name, []).append(region)
        return found

    def remember(self) -> None:
        """Remembers where the model's modules and tensors are."""
        modules = list(self._model.modules())
        holders = [each for module in modules for each in (module._modules, module._parameters, module._buffers)]
        self._seen = [(holder, name, _mark(each)) for holder in holders for name, each in holder.items()]

    def moved(self) -> bool:
        """Returns True if a module was replaced, or a tensor is in other memory, since the last `remember`."""
        return any(_mark(holder.get(name)) != mark for holder, name, mark in self._seen)

    def _of(self, name: str, tensor: Tensor, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[Region, TensorSpec]]:
        """Yields the published tensors that one tensor of the receiver holds, or parts of them."""
        names = self._parts(name)
        if names is None:
            if name not in specs:
                return
            names = [name]
        elif lacking := [part for part in names if part not in specs]:
            raise SyncError(
                f"fused: {name!r} is to hold {lacking[0]!r}, and the publisher's model has no tensor of that name."
            )
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            raise SyncError(
                f"{name!r} is a {type(tensor).__name__} that is not stored as plain numbers; load the model unsharded."
            )
        row = 0
        for part in names:
            spec = specs[part]
            if tensor.dtype != DTYPES[spec.dtype]:
                raise SyncError(
                    f"{name!r} is {tensor.dtype} in the receiver's model and {spec.dtype} in the publisher's; load the base in "
                    "that dtype."
                )
            dim, start, stop = self._span(spec)
            region = Region(name, tensor, spec.shape, dim, start, stop, row)
            yield region, spec
            shape = list(spec.shape)
            if shape:
                shape[dim] = stop - start
                row += shape[0]
            if list(tensor.shape[1:]) != shape[1:] or len(shape) != tensor.ndim:
                raise _other_shape(name, tensor, part, shape)
        if tensor.ndim and row != tensor.shape[0]:
            raise _other_shape(name, tensor, " + ".join(names), [row, *tensor.shape[1:]])

    def _parts(self, name: str) -> list[str] | None:
        """Returns the names of the published tensors that a fused tensor of the receiver holds; None if it is none."""
        for pattern, (_, parts) in self._fused.items():
            if match := pattern.fullmatch(name):
                return [_filled(part, match.groups()) for part in parts]
        return None

    def _span(self, spec: TensorSpec) -> tuple[int, int, int]:
        """Returns which part of a published tensor the receiver holds: (dim, start, stop)."""
        for pattern, cut in self._shard.items():
            if any(pattern.fullmatch(name) for name in (spec.name, *spec.others)):
                dim, start, stop = cut.span(spec.name, spec.shape) if isinstance(cut, Shard) else cut
                if dim not in (0, 1) or len(spec.shape) <= dim or not 0 <= start < stop <= spec.shape[dim]:
                    raise SyncError(
                        f"shard: {spec.name!r} has shape {spec.shape}, which has no part {(dim, start, stop)}."
                    )
                return dim, start, stop
        return 0, 0, spec.shape[0] if spec.shape else 1


def refuse_unwritable(regions: Mapping[str, Sequence[Region]]) -> None:
    """Refuses tensors that cannot be written, before anything is.

    Raises:
        SyncError: A tensor is expanded, on the meta device, in read-only memory or an inference tensor.
    """
    stuck = find_unwritable({region.name: region.tensor for each in regions.values() for region in each})
    if stuck is not None:
        raise SyncError(f"{stuck[0]!r} cannot be written: it {stuck[1]}. Nothing was changed.")


def _mark(each: nn.Module | Tensor | None) -> object:
    """Returns the address of a tensor's memory; a module, or None, is returned as it is."""
    return each.data_ptr() if isinstance(each, Tensor) else each


def _pattern(name: str) -> re.Pattern[str]:
    """Returns the expression of a name in which each '*' stands for some text."""
    return re.compile("(.+?)".join(map(re.escape, name.split("*"))))


def _filled(name: str, texts: Sequence[str]) -> str:
    """Returns a name with its '*' replaced by texts, in order."""
    pieces = name.split("*")
    return "".join(piece + text for piece, text in zip(pieces, [*texts, ""], strict=True))


def _other_shape(name: str, tensor: Tensor, part: str, shape: Sequence[int]) -> SyncError:
    return SyncError(
        f"{name!r} has shape {tuple(tensor.shape)} in the receiver's model, and {part!r} gives it {tuple(shape)}; fused= and "
        "shard= say how the publisher's tensors lie in it."
    )
