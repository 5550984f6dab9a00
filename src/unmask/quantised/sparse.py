"""A sparse matrix that multiplies from either side, in float32, without a dense copy of itself."""

from __future__ import annotations

import copy
import functools
import warnings

import torch
from torch import Tensor


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
