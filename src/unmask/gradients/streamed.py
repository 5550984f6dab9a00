"""Streamed scoring: one tensor's dense gradient against the running top-k, block by block.

Temporaries are of the size of a block, not of a tensor. Blocks are runs of whole rows (for a tensor of one dimension:
of entries), so that flat indices within a block are consecutive even where the gradient itself is a transposed view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.errors import MethodError, NonFiniteGradientError
from unmask.heuristics import Heuristic
from unmask.methods import Allocation
from unmask.slots import SlotTable
from unmask.topk import StreamingTopK

BLOCK = 1 << 20  # scalar weights scored at a time


@dataclass(frozen=True)
class Quota:
    """How many weights of one tensor, or of each of its rows, may still be unmasked; None: no bound."""

    tensor: int | None = None
    rows: Tensor | None = None  # (rows,) int64


def as_rows(tensor: Tensor) -> Tensor:
    """A tensor as (rows, columns): the first dimension by the rest; one row for a vector or a scalar."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.reshape(tensor.shape[0], -1)


def caps(allocation: Allocation, numel: int, columns: int, budget: int, total: int) -> int | None:
    """The bound ``ceil(B n / N)`` of an allocation's groups, n being the tensor's or the row's size."""
    if allocation == "global":
        return None
    size = numel if allocation == "tensor" else columns
    return min(size, -(-budget * size // total))


def quota(allocation: Allocation, weight: Tensor, budget: int, total: int, held: Tensor | None) -> Quota:
    """What one tensor may still receive.

    Args:
        allocation: How the budget is spread.
        weight: The tensor.
        budget: B.
        total: N, the number of eligible weights.
        held: Flat indices that are already unmasked and count against the bound; None for none.
    """
    rows = as_rows(weight)
    cap = caps(allocation, weight.numel(), rows.shape[1], budget, total)
    if cap is None:
        return Quota()
    if allocation == "tensor" or rows.shape[0] == 1:  # a long row comes in several blocks
        return Quota(tensor=cap - (0 if held is None else held.numel()))
    used = torch.zeros(rows.shape[0], dtype=torch.int64, device=weight.device)
    if held is not None:
        used += torch.bincount(held.to(weight.device) // rows.shape[1], minlength=rows.shape[0])
    return Quota(rows=cap - used)


class Ranker:
    """Ranks the entries of many tensors, one after the other, under one budget.

    Args:
        heuristic: Scores entries.
        table: The layout, and what is already unmasked.
        allocation: How the budget is spread.
        keep: k, how many entries to keep.
        step: Seeds random heuristics.
        exclude_members: Leave out what is unmasked already (increment-S); repeat-S ranks everything.
    """

    def __init__(
        self,
        heuristic: Heuristic,
        table: SlotTable,
        allocation: Allocation,
        keep: int,
        step: int,
        exclude_members: bool,
    ) -> None:
        self.heuristic, self.table, self.allocation = heuristic, table, allocation
        self.step, self.exclude_members = step, exclude_members
        self.top = StreamingTopK(keep)

    def rank(self, index: int, gradient: Tensor | None) -> None:
        """Offers one tensor's entries.

        Args:
            index: The tensor.
            gradient: Its dense gradient, any strides and float dtype; None for a heuristic that needs none.

        Raises:
            NonFiniteGradientError: A score is NaN or infinite.
            MethodError: The heuristic's scores are not of the weight's shape.
        """
        layout = self.table.layout
        weight, start = layout.plain(index), layout.starts[index]
        members = self.table.members(index) if self.exclude_members else None
        held = None if members is None else members[0]
        bound = quota(self.allocation, weight, self.table.positions.numel(), layout.total, held)
        top = self.top if bound.tensor is None else StreamingTopK(min(self.top.k, bound.tensor))
        for low, w, g in self._blocks(weight, gradient):
            scores = self._exclude(self._scores(index, low, w, g), low, held)
            if bound.rows is not None:
                scores = _best_of_rows(scores.view(w.shape), _rows_of(bound.rows, weight, low, w)).view(-1)
            top.update(scores, start + low, scores if g is None else g.reshape(-1).to(self.table.base.dtype))
        if top is not self.top:
            self.top.merge(top.result())

    def _blocks(self, weight: Tensor, gradient: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        rows, grads = as_rows(weight), None if gradient is None else as_rows(gradient)
        columns = rows.shape[1]
        if rows.shape[0] == 1 and self.heuristic.elementwise:  # a vector, which may be long: cut it up
            for low in range(0, columns, BLOCK):
                part = slice(low, low + BLOCK)
                yield low, rows[:, part], None if grads is None else grads[:, part]
            return
        height = max(1, BLOCK // columns) if self.heuristic.elementwise else rows.shape[0]
        for row in range(0, rows.shape[0], height):
            part = slice(row, row + height)
            yield row * columns, rows[part], None if grads is None else grads[part]

    def _scores(self, index: int, low: int, weight: Tensor, gradient: Tensor | None) -> Tensor:
        scores = self.heuristic.score(weight, gradient, (self.step, index, low))
        if scores.shape != weight.shape:
            raise MethodError(
                f"heuristic {self.heuristic.name!r} gave scores of shape {tuple(scores.shape)} for weights of shape "
                f"{tuple(weight.shape)}; it must give one score per weight."
            )
        scores = scores.reshape(-1).to(self.table.base.dtype)
        worst = [s.item() for s in scores.aminmax() if not torch.isfinite(s)]  # NaN propagates
        if worst:
            raise NonFiniteGradientError(
                f"a score of {self.table.layout.names[index]!r} is {worst[0]} (heuristic {self.heuristic.name!r}): the loss, "
                "the gradient or the weight is not finite, or the heuristic makes it so"
            )
        return scores

    def _exclude(self, scores: Tensor, low: int, held: Tensor | None) -> Tensor:
        """Scores without the entries that are unmasked already; a copy, for a heuristic may return the weight itself."""
        if held is None:
            return scores
        edges = torch.tensor([low, low + scores.numel()], device=held.device)
        first, last = torch.searchsorted(held, edges).tolist()
        return scores.index_fill(0, (held[first:last] - low).to(scores.device), -torch.inf)


def _rows_of(bounds: Tensor, weight: Tensor, low: int, block: Tensor) -> Tensor:
    first = low // as_rows(weight).shape[1]
    return bounds[first : first + block.shape[0]]


def _best_of_rows(scores: Tensor, bounds: Tensor) -> Tensor:
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
