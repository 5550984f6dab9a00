"""Reads and writes single entries of a tensor, which is seen as a matrix, at flat (row-major) indices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def take(tensor: Tensor, flat: Tensor) -> Tensor:
    """Returns the entries of a tensor of any shape and strides, without a copy of the rest: (m,) of its dtype, on its device.

    The row-major indices ``flat`` are (m,) int64, on any device.

    Example:
        >>> take(torch.arange(6).view(2, 3).t(), torch.tensor([1, 2])).tolist()
        [3, 1]
    """
    flat = flat.to(tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[flat]
    return tensor[torch.unravel_index(flat, tensor.shape)]


def put(tensor: Tensor, flat: Tensor, values: Tensor) -> None:
    """Writes values (cast to the tensor's dtype) at flat indices, in place."""
    tensor.put_(flat.to(tensor.device), values.to(tensor.device, tensor.dtype))


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Returns ``x[:, columns]``, (T, m), of x (T, n) and columns (m,) int64 on its device."""
    if x.device.type == "cpu":  # Here a gather is faster than index_select, most of all in bfloat16.
        return x.gather(1, columns.expand(x.shape[0], -1))
    return x.index_select(1, columns)


def as_rows(tensor: Tensor) -> Tensor:
    """Returns a tensor as a matrix: the first dimension by the others. A vector or a scalar becomes one row."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def among(flat: Tensor, members: Tensor) -> Tensor:
    """Tells for each index, int64 of any shape, whether it is one of the members: (n,) int64, ascending, on its device.

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

    Attributes:
        shape: The shape (rows, columns) of the tensor as a matrix; see `as_rows`.
        flat: The entries' row-major indices: (m,) int64, ascending, on the tensor's device.
        slots: The entries' slots: (m,) int64, on the device of ``values``.
    """

    shape: tuple[int, int]
    flat: Tensor
    slots: Tensor

    @cached_property
    def chosen(self) -> dict[Any, Any]:
        """The way in which each product at these entries is made, once it was chosen; see `unmask.gradients.choice`."""
        return {}

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry: (m,) int64."""
        return self.flat.div(max(1, self.shape[1]), rounding_mode="floor")

    @cached_property
    def columns(self) -> Tensor:
        """The column of each entry: (m,) int64."""
        return self.flat - self.rows * self.shape[1]

    @cached_property
    def starts(self) -> Tensor:
        """The place where each row's entries start, as in a CSR matrix: (rows + 1,) int64."""
        edges = torch.arange(self.shape[0] + 1, device=self.flat.device) * self.shape[1]
        return torch.searchsorted(self.flat, edges)

    @cached_property
    def used_rows(self) -> Tensor:
        """The rows that hold entries, ascending."""
        return self.rows.unique_consecutive()

    @cached_property
    def used_columns(self) -> Tensor:
        """The columns that hold entries, ascending."""
        return self.columns.unique()

    def below(self, active: int) -> Entries:
        """Returns the entries whose slot is below ``active``."""
        inside = self.slots < active
        return Entries(self.shape, self.flat[inside.to(self.flat.device)], self.slots[inside])


def take_gradient(gradient: Tensor, entries: Entries) -> Tensor:
    """Returns the m entries of a tensor's whole gradient, (m,): 0 in the rows that a sparse gradient does not hold.

    The gradient is dense, of the tensor's shape, or sparse in whole rows and coalesced, as `embedding_gradient` makes it.
    """
    if not gradient.is_sparse:
        return gradient.take(entries.flat)  # Half of the time of an index, for the host.
    seen, values = gradient._indices()[0], gradient._values()
    taken = torch.zeros(entries.flat.shape, dtype=values.dtype, device=values.device)
    if not seen.numel():
        return taken
    place = torch.searchsorted(seen, entries.rows).clamp_(max=seen.numel() - 1)
    hit = (seen[place] == entries.rows).nonzero().squeeze(1)
    return taken.index_put((hit,), values[place[hit], entries.columns[hit]])


def bits(tensor: Tensor) -> Tensor:
    """Views the tensor's bits as integers, in the same shape; a complex tensor is viewed as its real and imaginary parts."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.view(_INTEGERS[tensor.element_size()])
