"""Keeps, next to a quantised matrix, the entries whose values were changed: its sidecar."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from unmask.gradients.entries import among
from unmask.gradients.sampled import csr_matrix
from unmask.quantised.sources import Source

_BLOCK = 1 << 20  # The entries that are read at a time if all are needed.


class Sidecar:
    """The current weights of one quantised matrix: the payload, which it stores, and some entries with other values.

    Attributes:
        source: The reader of the payload, which is never written.
        flat: The flat indices of the entries that have a value in the sidecar: (m,) int64, ascending.
        values: Their values: (m,) float32.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.flat = torch.empty(0, dtype=torch.int64, device=source.device)
        self.values = torch.empty(0, device=source.device)
        self._base = self.values  # The payload's values there: (m,).
        self._matrix: SparseMatrix | None = None

    def copy(self) -> Sidecar:
        """Returns another sidecar of the same payload, with the same entries."""
        return copy.copy(self)  # Both may share tensors, which are never changed in place.

    def take(self, flat: Tensor) -> Tensor:
        """Returns the current weights at flat indices (m,): (m,) float32."""
        flat = flat.to(self.source.device)
        values = self.source.entries(flat)
        if self.flat.numel():
            own = among(flat, self.flat)
            values[own] = self.values[torch.searchsorted(self.flat, flat[own])]
        return values

    def rows(self, low: int, high: int) -> Tensor:
        """Returns the current weights of the rows ``low`` to ``high - 1``: (high - low, in) float32."""
        rows, columns = self.source.rows(low, high), self.source.shape[1]
        edges = torch.tensor([low * columns, high * columns], device=self.flat.device)
        first, last = torch.searchsorted(self.flat, edges).tolist()
        rows.view(-1)[self.flat[first:last] - low * columns] = self.values[first:last]
        return rows

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Sets weights at flat indices (m,); drops the entries elsewhere that are back at the payload's value."""
        device = self.source.device
        flat, values = flat.to(device), values.detach().to(device, torch.float32)
        if flat.shape == self.flat.shape and torch.equal(flat, self.flat):
            self.values = values.clone()  # Not in place: a graph may hold the old values.
            return
        kept = ~among(self.flat, flat.sort().values) & (self.values != self._base)
        self.flat, order = torch.cat([self.flat[kept], flat]).sort()
        self.values = torch.cat([self.values[kept], values])[order]
        self._base = torch.cat([self._base[kept], self.source.entries(flat)])[order]
        self._matrix = None

    def clear(self) -> None:
        """Sets every weight back to the payload's value."""
        self.put(self.flat, self._base)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the current weights in blocks of rows, each with the number of its first row."""
        rows, columns = self.source.shape
        height = max(1, _BLOCK // max(1, columns))
        for low in range(0, rows, height):
            yield low, self.rows(low, min(rows, low + height))

    def largest(self) -> tuple[Tensor, Tensor]:
        """Returns the least and the largest weight."""
        parts = [block.aminmax() for _, block in self.blocks()]
        return torch.stack([part.min for part in parts]).min(), torch.stack([part.max for part in parts]).max()

    def deviating(self) -> tuple[Tensor, Tensor]:
        """Returns the flat indices and the values of the entries that differ from the payload."""
        differ = self.values != self._base
        return self.flat[differ], self.values[differ]

    def deviation(self) -> SparseMatrix | None:
        """Returns what the sidecar adds to the payload, as a sparse (out, in) matrix; None if it holds no entry.

        The entries move to the device of the layer first.
        """
        device = self.source.device
        if self.flat.device != device:
            self.flat, self.values, self._base = (t.to(device) for t in (self.flat, self.values, self._base))
            self._matrix = None
        if not self.flat.numel():
            return None
        if self._matrix is None:
            self._matrix = SparseMatrix(self.source.shape, self.flat)
        return self._matrix.filled(self.values - self._base)


class SparseMatrix:
    """An (out, in) matrix that is zero except at given entries, kept by rows and by columns.

    Args:
        shape: The shape (out, in).
        flat: The flat indices of its entries: (m,) int64, ascending. The entries are zero until `filled`.

    Example:
        >>> matrix = SparseMatrix((2, 3), torch.tensor([1, 5])).filled(torch.tensor([10.0, 1.0]))
        >>> matrix.times(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[20.0, 3.0]]
        >>> matrix.transposed_times(torch.tensor([[1.0, 2.0]])).tolist()
        [[0.0, 10.0, 2.0]]
    """

    def __init__(self, shape: tuple[int, int], flat: Tensor) -> None:
        self.shape = shape
        rows, columns = flat // shape[1], flat % shape[1]
        self._order = columns.argsort(stable=True)
        self._by_rows = _starts(rows, shape[0]), columns
        self._by_columns = _starts(columns[self._order], shape[1]), rows[self._order]
        self._values = torch.zeros(flat.shape, device=flat.device)

    def filled(self, values: Tensor) -> SparseMatrix:
        """Returns a matrix with other values (m,) float32 at the same entries."""
        other = copy.copy(self)
        other._values = values
        return other

    def times(self, x: Tensor) -> Tensor:
        """Returns ``x W^T``: (T, out) float32, of x (T, in) of any float dtype."""
        return _product(self._by_rows, self._values, self.shape, x)

    def transposed_times(self, g: Tensor) -> Tensor:
        """Returns ``g W``: (T, in) float32, of g (T, out) of any float dtype."""
        return _product(self._by_columns, self._values[self._order], (self.shape[1], self.shape[0]), g)


def _starts(lines: Tensor, count: int) -> Tensor:
    """Returns the places where each line's entries start, (count + 1,), of ascending line numbers."""
    return torch.searchsorted(lines, torch.arange(count + 1, device=lines.device))


def _product(where: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, int], x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return torch.mm(csr_matrix(*where, values, shape), x.float().t()).t()
