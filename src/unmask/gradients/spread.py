"""What spreads a selection over a tensor: caps on its parts, and scores measured against their row's and column's mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.method import Allocation, Normalise
from unmask.slots import as_rows


@dataclass(frozen=True)
class Quota:
    """How many weights of one tensor, or of each of its rows or columns, may still be unmasked; None: no bound."""

    tensor: int | None = None
    rows: Tensor | None = None  # (rows,) int64
    columns: Tensor | None = None  # (columns,) int64

    def apply(self, scores: Tensor, first: int) -> Tensor:
        """Sets what goes beyond a row's or a column's bound to -inf.

        Args:
            scores: (n, columns) of n rows; of all rows where columns have bounds.
            first: Which row of the tensor the first one is.
        """
        if self.rows is not None:
            return best_of_rows(scores, self.rows[first : first + scores.shape[0]])
        return scores if self.columns is None else best_of_rows(scores.t(), self.columns).t()


def quota(allocation: Allocation, weight: Tensor, budget: int, total: int, held: Tensor | None) -> Quota:
    """What one tensor may still receive: ``ceil(B n / N)`` of each group of n weights, but for what is unmasked already.

    Args:
        allocation: How the budget is spread.
        weight: The tensor; a vector is one group, whether rows or columns are bounded.
        budget: B.
        total: N, the number of eligible weights.
        held: Flat indices that are already unmasked and count against the bound; None for none.
    """
    if allocation == "global":
        return Quota()
    rows, columns = as_rows(weight).shape
    group = "tensor" if rows == 1 else allocation  # a long vector comes in several blocks
    size = {"tensor": rows * columns, "row": columns, "column": rows}[group]
    cap = min(size, -(-budget * size // total))
    if group == "tensor":
        return Quota(tensor=cap - (0 if held is None else held.numel()))
    used = torch.zeros(rows if group == "row" else columns, dtype=torch.int64, device=weight.device)
    if held is not None:
        held = held.to(weight.device)
        used += torch.bincount(held // columns if group == "row" else held % columns, minlength=used.numel())
    return Quota(rows=cap - used) if group == "row" else Quota(columns=cap - used)


def best_of_rows(scores: Tensor, bounds: Tensor) -> Tensor:
    """Sets all but the ``bounds[r]`` best entries of each row r to -inf; ties go to the smaller column."""
    most = int(bounds.max().item())
    if most <= 0:
        return torch.full_like(scores, -torch.inf)
    best = scores.topk(min(most, scores.shape[1]), dim=1).values
    cut = best.gather(1, (bounds.clamp(1, best.shape[1]) - 1).unsqueeze(1))
    above = scores > cut
    ties = scores == cut
    room = bounds.unsqueeze(1) - above.sum(1, keepdim=True)
    keep = (above | (ties & (ties.cumsum(1) <= room))) & (bounds > 0).unsqueeze(1)
    return scores.masked_fill(~keep, -torch.inf)


@dataclass(frozen=True)
class Divisors:
    """What the scores of one tensor are divided by; 1 for a row or column whose mean is 0, as its scores are then.

    Attributes:
        rows: (rows,).
        columns: (columns,); of a vector (1,).
    """

    rows: Tensor
    columns: Tensor

    def divide(self, scores: Tensor, first: int) -> Tensor:
        """``s_ij / (rows_i columns_j)`` of some whole rows (n, columns), or of a part of a vector, from row ``first`` on."""
        rows = self.rows[first : first + scores.shape[0], None].to(scores.dtype)
        return scores / rows / self.columns.to(scores.dtype)  # one by one: their product may underflow


def divisors_of(
    normalise: Normalise, shape: tuple[int, int], blocks: Iterable[tuple[int, Tensor]], device: torch.device
) -> Divisors:
    """What a tensor's scores are divided by, from the means of |score| over its rows, its columns, and all of it.

    Args:
        normalise: ``"row-column"``: r_i c_j / m, the scores that the means alone predict (Adafactor's factors, arXiv
            1804.04235); ``"row-column-root"``: sqrt(r_i c_j), which takes half of that out. A vector's are divided by m.
        shape: (rows, columns) of the tensor.
        blocks: The first row's place, and the scores of some whole rows (n, columns); of a vector, of some entries (1, n).
            O(rows + columns) numbers are kept of them.
        device: Where the scores are.

    Example:
        >>> scores = torch.tensor([[1.0, 3.0], [2.0, 6.0]])  # of rank 1
        >>> divisors = divisors_of("row-column", (2, 2), [(0, scores)], scores.device)
        >>> divisors.divide(scores, 0).round(decimals=4).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    rows, columns = shape
    across = torch.zeros(rows, dtype=torch.float64, device=device)
    down = torch.zeros(1 if rows == 1 else columns, dtype=torch.float64, device=device)
    for first, scores in blocks:
        sizes = scores.abs()
        across[first : first + sizes.shape[0]] += sizes.sum(1, dtype=torch.float64)
        if rows > 1:
            down += sizes.sum(0, dtype=torch.float64)
    across /= columns
    down = across if rows == 1 else down / rows
    if normalise == "row-column-root" or rows == 1:
        across, down = across.sqrt(), down.sqrt()
    else:
        root = across.mean().sqrt()
        across, down = (mean / root for mean in (across, down))
    return Divisors(*(torch.where(mean > 0, mean, 1.0) for mean in (across, down)))
