"""Limits how many weights of a tensor, of each row or of each column may be unmasked, to spread a selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.gradients.entries import as_rows
from unmask.methods.method import Allocation


@dataclass(frozen=True)
class Quota:
    """The number of weights of one tensor, or of each of its rows or columns, that may still be unmasked.

    Attributes:
        tensor: The bound of the whole tensor; None if it has none.
        rows: The bound of each row, (rows,) int64; None if rows have none.
        columns: The bound of each column, (columns,) int64; None if columns have none.
    """

    tensor: int | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, scores: Tensor, first: int) -> Tensor:
        """Sets the scores (n, columns) beyond the bound of a row, from ``first`` on, or of a column of all rows to -inf."""
        if self.rows is not None:
            return best_of_rows(scores, self.rows[first : first + scores.shape[0]])
        return scores if self.columns is None else best_of_rows(scores.t(), self.columns).t()


def quota(
    allocation: Allocation, weight: Tensor, budget: int, total: int, held: Tensor | None, avoided: Tensor | None = None
) -> Quota:
    """Returns what one tensor may still receive: ``ceil(B n / N)`` of each group of n weights, less what is unmasked.

    A vector is one group, even if rows or columns are bounded.

    Args:
        allocation: The kind of group.
        weight: The tensor.
        budget: B.
        total: N, the number of all weights that may be selected.
        held: The (m,) int64 flat indices that are unmasked already and count against the bound; None if there are none.
        avoided: The flat indices that may not be selected, and do not count among a group's n; None if there are none.
    """
    if allocation == "global":
        return Quota()
    rows, columns = as_rows(weight).shape
    group = "tensor" if rows == 1 else allocation  # A long vector comes in several blocks.
    if group == "tensor":
        size = rows * columns - (0 if avoided is None else avoided.numel())
        return Quota(tensor=-(-budget * size // total) - (0 if held is None else held.numel()))
    groups, size = (rows, columns) if group == "row" else (columns, rows)

    def count(flat: Tensor | None) -> Tensor:
        """Counts flat indices by group: (groups,) int64."""
        if flat is None:
            return torch.zeros(groups, dtype=torch.int64, device=weight.device)
        flat = flat.to(weight.device)
        return torch.bincount(flat // columns if group == "row" else flat % columns, minlength=groups)

    left = -((size - count(avoided)) * -budget // total) - count(held)
    return Quota(rows=left) if group == "row" else Quota(columns=left)


def best_of_rows(scores: Tensor, bounds: Tensor) -> Tensor:
    """Sets all scores (rows, columns) but the ``bounds[r]`` best of each row r to -inf; a tie goes to the smaller column.

    Example:
        >>> best_of_rows(torch.tensor([[1.0, 3.0, 3.0], [1.0, 2.0, 3.0]]), torch.tensor([1, 2])).tolist()
        [[-inf, 3.0, -inf], [-inf, 2.0, 3.0]]
    """
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
