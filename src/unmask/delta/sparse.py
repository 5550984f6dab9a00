"""SparseTensor: the changed entries of one tensor, and the checks that make a damaged one an error."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unmask.errors import DeltaError
from unmask.files import tensor_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of tensors that a delta may hold in part."""


@dataclass(frozen=True)
class SparseTensor:
    """The changed entries of one tensor.

    Attributes:
        indices: (n,) int64 flat (row-major) indices, strictly ascending.
        values: (n,) in the tensor's own dtype.
        shape: The whole tensor's shape.
        slots: (n,) int64: each entry's place in the order of unmasking, over all tensors; None where the order is not kept.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]
    slots: Tensor | None = None
    # What is known of the places: that they were checked, their hash, and their copies on devices.
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _values_known: bool = field(default=False, init=False, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """The number of weights of the tensor that the delta sets."""
        return self.indices.numel()

    def holding(self, values: Tensor) -> SparseTensor:
        """Returns entries at the same places with other values: (n,) of the same dtype, which may be NaN or infinite.

        Example:
            >>> entry = SparseTensor(torch.tensor([0, 3]), torch.tensor([1.0, 2.0]), (2, 2))
            >>> entry.holding(torch.tensor([5.0, 6.0])).values.tolist()
            [5.0, 6.0]
        """
        other = SparseTensor(self.indices, values, self.shape)
        object.__setattr__(other, "_known", self._known)
        object.__setattr__(other, "_values_known", True)
        return other

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the dtype, the shape, the indices and the values, in hex; docs/delta.md gives its bytes."""
        sha = hashlib.sha256(f"{self.values.dtype} {list(self.shape)} {self._indices_digest()} ".encode())
        sha.update(tensor_bytes(self.values))
        return sha.hexdigest()

    def _indices_digest(self) -> str:
        if "sha" not in self._known:
            narrow = torch.int32 if math.prod(self.shape) < 2**31 else torch.int64
            self._known["sha"] = hashlib.sha256(tensor_bytes(self.indices.to(narrow))).hexdigest()
        return self._known["sha"]

    def has_places_of(self, other: SparseTensor) -> bool:
        """Returns True if both set the same entries of tensors of one shape and dtype."""
        if (self.shape, self.values.dtype) != (other.shape, other.values.dtype):
            return False
        return self._known is other._known or self._indices_digest() == other._indices_digest()

    def part(self, device: torch.device, offset: int, numel: int) -> tuple[int, int, Tensor]:
        """Returns the entries in a part of the tensor; they are found, and moved to a device, at the first call only.

        Args:
            device: The device on which the indices are wanted.
            offset: The flat index at which the part begins.
            numel: The number of the part's entries.

        Returns:
            (low, high, indices): the entries ``low`` to ``high - 1`` lie in the part, at these indices of it.
        """
        key = device, offset, numel
        if key not in self._known:
            low, high = 0, self.numel
            if numel < math.prod(self.shape):
                low, high = torch.searchsorted(self.indices, torch.tensor([offset, offset + numel])).tolist()
            inside = self.indices[low:high]
            self._known[key] = low, high, (inside - offset if offset else inside).to(device, torch.int64)
        return self._known[key]

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy or a pickle holds: the fields, without what is known of them."""
        return {name: value for name, value in vars(self).items() if name != "digest"} | {"_known": {}}


def check_entry(name: str, entry: SparseTensor) -> None:
    """Refuses a tensor's entries that no selection can have made. Entries that were checked before are not read again.

    Raises:
        DeltaError: The shape, the indices or the values are not those of a trained tensor.
    """
    if not entry._known.get("checked"):
        _check_places(name, entry)
        entry._known["checked"] = True
    if not entry._values_known and not torch.isfinite(entry.values).all():
        raise DeltaError(f"a value of {name!r} is NaN or infinite; the delta is damaged or training diverged.")
    object.__setattr__(entry, "_values_known", True)


def _check_places(name: str, entry: SparseTensor) -> None:
    """Refuses a shape, indices or a dtype that no trained tensor has."""
    are_sizes = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in entry.shape)
    if not are_sizes or math.prod(entry.shape) >= 2**63:
        raise DeltaError(f"{name!r} has shape {entry.shape}, which no tensor has; the delta is damaged.")
    numel, indices = math.prod(entry.shape), entry.indices
    are_tensors = isinstance(indices, Tensor) and isinstance(entry.values, Tensor)
    if not are_tensors or indices.dtype not in (torch.int64, torch.int32):
        raise DeltaError(f"{name!r} must have indices and values as tensors, the indices int64; the delta is damaged.")
    if indices.ndim != 1 or indices.shape != entry.values.shape:
        raise DeltaError(
            f"{name!r} has {tuple(indices.shape)} indices for {tuple(entry.values.shape)} values; the delta is damaged."
        )
    if (indices[1:] <= indices[:-1]).any():
        raise DeltaError(f"the indices of {name!r} do not ascend; the delta is damaged.")
    if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= numel):
        raise DeltaError(
            f"an index of {name!r} is outside 0..{numel - 1}, its shape being {entry.shape}; the delta is damaged."
        )
    if entry.values.dtype not in FLOATS:
        raise DeltaError(f"the values of {name!r} are {entry.values.dtype}, which no trained weight is; it is damaged.")


def check_slots(sparse: Mapping[str, SparseTensor]) -> None:
    """Refuses an order of unmasking that does not number all entries from 0; the order may also be left out.

    Raises:
        DeltaError: The order is kept for some entries only, or is no numbering.
    """
    kept = [entry.slots for entry in sparse.values() if entry.slots is not None]
    if not kept:
        return
    for name, entry in sparse.items():
        if entry.slots is None or entry.slots.shape != entry.indices.shape:
            raise DeltaError(f"the order of unmasking has no slot for each entry of {name!r}; the delta is damaged.")
    total = sum(entry.numel for entry in sparse.values())
    if not torch.equal(torch.cat(kept).sort().values, torch.arange(total)):
        raise DeltaError(f"the order of unmasking does not number the delta's {total} entries; the delta is damaged.")
