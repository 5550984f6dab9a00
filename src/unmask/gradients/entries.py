"""Entries of a tensor seen as a matrix: reads and writes them at flat indices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def take(tensor: Tensor, flat: Tensor) -> Tensor:
    """Entries of a tensor at flat (row-major) indices, without copying a non-contiguous tensor.

    Example:
        >>> take(torch.arange(6).view(2, 3).t(), torch.tensor([1, 2])).tolist()
        [3, 1]
    """
    flat = flat.to(tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[flat]
    return tensor[torch.unravel_index(flat, tensor.shape)]


def put(tensor: Tensor, flat: Tensor, values: Tensor) -> None:
    """Writes values (cast to the tensor's dtype) at flat (row-major) indices, in place."""
    tensor.put_(flat.to(tensor.device), values.to(tensor.device, tensor.dtype))


def as_rows(tensor: Tensor) -> Tensor:
    """A tensor as (rows, columns): the first dimension by the rest; one row for a vector or a scalar."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(tensor.shape[0], -1)


def among(flat: Tensor, members: Tensor) -> Tensor:
    """Which of some indices are members: bool, of ``flat``'s shape. ``members`` (n,) ascend.

    Example:
        >>> among(torch.tensor([5, 1, 2]), torch.tensor([2, 5])).tolist()
        [True, False, True]
    """
    if not members.numel():
        return torch.zeros_like(flat, dtype=torch.bool)
    return members[torch.searchsorted(members, flat).clamp_(max=members.numel() - 1)] == flat


@dataclass(frozen=True, eq=False)
class Entries:
    """Some entries of one tensor, and the slots they belong to.

    The tensor is seen as a matrix: its first dimension by the rest; a vector as one row.

    Attributes:
        shape: (rows, columns) of the matrix.
        flat: (m,) int64, ascending, on the tensor's device.
        slots: (m,) int64, on the device of ``values``.
    """

    shape: tuple[int, int]
    flat: Tensor
    slots: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """(m,) int64."""
        return self.flat.div(max(1, self.shape[1]), rounding_mode="floor")

    @cached_property
    def columns(self) -> Tensor:
        """(m,) int64."""
        return self.flat - self.rows * self.shape[1]

    @cached_property
    def starts(self) -> Tensor:
        """(rows + 1,) int64: where each row's entries start, as in a CSR matrix."""
        edges = torch.arange(self.shape[0] + 1, device=self.flat.device) * self.shape[1]
        return torch.searchsorted(self.flat, edges)

    @cached_property
    def used_rows(self) -> Tensor:
        """Rows that hold entries, ascending."""
        return self.rows.unique_consecutive()

    @cached_property
    def used_columns(self) -> Tensor:
        """Columns that hold entries, ascending."""
        return self.columns.unique()

    def below(self, active: int) -> Entries:
        """Those whose slot is below ``active``."""
        inside = self.slots < active
        return Entries(self.shape, self.flat[inside.to(self.flat.device)], self.slots[inside])
