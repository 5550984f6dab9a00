"""SparseTensor: the changed entries of one tensor, and the checks that make a damaged one an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.errors import DeltaError

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

    @property
    def numel(self) -> int:
        """The number of weights of the tensor that the delta sets."""
        return self.indices.numel()


def check_entry(name: str, entry: SparseTensor) -> None:
    """Refuses a tensor's entries that no selection can have made.

    Raises:
        DeltaError: The shape, the indices or the values are not those of a trained tensor.
    """
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
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= numel):
        raise DeltaError(
            f"an index of {name!r} is outside 0..{numel - 1}, its shape being {entry.shape}; the delta is damaged."
        )
    if (indices.diff() <= 0).any():
        raise DeltaError(f"the indices of {name!r} do not ascend; the delta is damaged.")
    if entry.values.dtype not in FLOATS:
        raise DeltaError(f"the values of {name!r} are {entry.values.dtype}, which no trained weight is; it is damaged.")
    if not torch.isfinite(entry.values).all():
        raise DeltaError(f"a value of {name!r} is NaN or infinite; the delta is damaged or training diverged.")


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
