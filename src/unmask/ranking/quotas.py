"""Caps that spread a selection over the tensors, their rows or their columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.gradients.entries import as_rows
from unmask.methods.method import Allocation


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
