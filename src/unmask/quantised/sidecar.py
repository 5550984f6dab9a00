"""A sidecar: the entries of a quantised matrix that hold other values than its payload says."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from unmask.quantised.kinds import Source
from unmask.quantised.sparse import SparseMatrix
from unmask.slots import among

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
