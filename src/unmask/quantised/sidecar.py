"""A sidecar: the entries of a quantised matrix that hold other values than its payload says."""

from __future__ import annotations

import copy
import functools
import warnings

import torch
from torch import Tensor

from unmask.gradients.entries import among
from unmask.quantised.sources import Source

_BLOCK = 1 << 20  # entries that are read at a time where all are wanted


class Sidecar:
    """The current weights of one quantised matrix: its payload, and on top of it some entries of their own.

    Attributes:
        source: The payload; never written.
        flat: (m,) int64, ascending: entries that have a value of their own.
        values: (m,) float32.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.flat = torch.empty(0, dtype=torch.int64, device=source.device)
        self.values = torch.empty(0, device=source.device)
        self._base = self.values  # (m,) what the payload holds there
        self._matrix: SparseMatrix | None = None

    def copy(self) -> Sidecar:
        """Another sidecar of the same payload, with the same entries."""
        return copy.copy(self)  # none of its tensors is ever changed in place

    def follow(self) -> None:
        """Moves the entries to where the layer has been moved."""
        device = self.source.device
        if self.flat.device != device:
            self.flat, self.values, self._base = (t.to(device) for t in (self.flat, self.values, self._base))
            self._matrix = None

    def take(self, flat: Tensor) -> Tensor:
        """Current weights (m,) at flat indices."""
        flat = flat.to(self.source.device)
        values = self.source.entries(flat)
        if self.flat.numel():
            own = among(flat, self.flat)
            values[own] = self.values[torch.searchsorted(self.flat, flat[own])]
        return values

    def rows(self, low: int, high: int) -> Tensor:
        """Current weights (high - low, in) of a run of rows."""
        rows, columns = self.source.rows(low, high), self.source.shape[1]
        edges = torch.tensor([low * columns, high * columns], device=self.flat.device)
        first, last = torch.searchsorted(self.flat, edges).tolist()
        rows.view(-1)[self.flat[first:last] - low * columns] = self.values[first:last]
        return rows

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Sets weights at flat indices. Others that are back at the payload's value are let go of."""
        device = self.source.device
        flat, values = flat.to(device), values.detach().to(device, torch.float32)
        if flat.shape == self.flat.shape and torch.equal(flat, self.flat):
            self.values = values.clone()  # not in place: a graph may hold the old ones
            return
        kept = ~among(self.flat, flat.sort().values) & (self.values != self._base)
        self.flat, order = torch.cat([self.flat[kept], flat]).sort()
        self.values = torch.cat([self.values[kept], values])[order]
        self._base = torch.cat([self._base[kept], self.source.entries(flat)])[order]
        self._matrix = None

    def clear(self) -> None:
        """Every weight is the payload's again."""
        self.put(self.flat, self._base)

    def largest(self) -> tuple[Tensor, Tensor]:
        """The least and the largest weight."""
        rows, columns = self.source.shape
        height = max(1, _BLOCK // max(1, columns))
        parts = [self.rows(low, min(rows, low + height)).aminmax() for low in range(0, rows, height)]
        return torch.stack([part.min for part in parts]).min(), torch.stack([part.max for part in parts]).max()

    def deviating(self) -> tuple[Tensor, Tensor]:
        """Flat indices and values of the entries that differ from the payload."""
        differ = self.values != self._base
        return self.flat[differ], self.values[differ]

    def deviation(self) -> SparseMatrix | None:
        """What the sidecar adds to the payload, as a sparse (out, in) matrix; None if it holds no entry."""
        if not self.flat.numel():
            return None
        if self._matrix is None:
            self._matrix = SparseMatrix(self.source.shape, self.flat)
        return self._matrix.filled(self.values - self._base)


class SparseMatrix:
    """An (out, in) matrix of given entries, kept by rows and by columns.

    Args:
        shape: (out, in).
        flat: (m,) int64, ascending: where its entries are. They are zero until `filled`.

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
        """The same places with other entries (m,) float32."""
        other = copy.copy(self)
        other._values = values
        return other

    def times(self, x: Tensor) -> Tensor:
        """``x W^T``: (T, in) of any float dtype to (T, out) float32."""
        return _product(self._by_rows, self._values, self.shape, x)

    def transposed_times(self, g: Tensor) -> Tensor:
        """``g W``: (T, out) of any float dtype to (T, in) float32."""
        return _product(self._by_columns, self._values[self._order], (self.shape[1], self.shape[0]), g)


def _starts(lines: Tensor, count: int) -> Tensor:
    """(count + 1,): where each line's entries start, of ascending line numbers."""
    return torch.searchsorted(lines, torch.arange(count + 1, device=lines.device))


def _product(where: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, int], x: Tensor) -> Tensor:
    _quiet()
    with torch.autocast(x.device.type, enabled=False):
        matrix = torch.sparse_csr_tensor(*where, values, size=shape, check_invariants=False)
        return torch.mm(matrix, x.float().t()).t()


@functools.cache
def _quiet() -> None:
    """Takes torch's one warning that sparse CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
