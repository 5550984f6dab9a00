"""Streamed scoring: one tensor's gradient against the running top-k, block by block.

Temporaries are of the size of a block, not of a tensor. As soon as k entries are known, a block whose largest |g| cannot
reach the k-th score is passed over after one look, and of the others only the entries that can are scored: where the
heuristic has a `ceiling`, and in the order in which the gradient lies in memory. Otherwise blocks are runs of whole rows
(for a tensor of one dimension: of entries), so that flat indices are consecutive even where the gradient is transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from unmask.errors import MethodError, NonFiniteGradientError
from unmask.gradients.entries import among, as_rows, take
from unmask.gradients.factors import Factors, as_dense
from unmask.methods.heuristics import Heuristic
from unmask.methods.method import Allocation
from unmask.ranking.ledger import Ledger
from unmask.ranking.quotas import quota
from unmask.ranking.topk import Ranked, StreamingTopK

BLOCK = 1 << 20  # scalar weights scored at a time
GLANCE = 1 << 18  # scalar gradients looked at at a time: small enough for a CPU's cache
_ROUNDING = 1e-4  # how far rounding may lift a score over its ceiling, relative


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
        table: Ledger,
        allocation: Allocation,
        keep: int,
        step: int,
        exclude_members: bool,
    ) -> None:
        self.heuristic, self.table, self.allocation = heuristic, table, allocation
        self.step, self.exclude_members = step, exclude_members
        self.top = StreamingTopK(keep, heuristic.floor)

    def rank(self, index: int, gradient: Tensor | Factors | None) -> None:
        """Offers one tensor's entries.

        Args:
            index: The tensor.
            gradient: Its gradient, any strides and float dtype: dense, sparse in whole rows (an embedding's, coalesced), or
                the factors of a product; None for a heuristic that needs none.

        Raises:
            NonFiniteGradientError: A score is NaN or infinite.
            MethodError: The heuristic's scores are not of the weight's shape.
        """
        if isinstance(gradient, Factors) and self._rank_factors(index, gradient):
            return
        if isinstance(gradient, Tensor) and gradient.is_sparse and self._vanishes():
            self._rank_rows(index, gradient)
            return
        whole = None if gradient is None else as_dense(gradient)
        if whole is not None and whole.ndim > 1 and self._glance(index, whole):
            return
        self._rank_whole(index, whole)

    def rank_zero(self, index: int) -> None:
        """Offers a tensor that the loss did not reach: its gradient is zero, which may rule all of it out."""
        if self.heuristic.floor < 0:
            weight = self.table.layout.plain(index)
            self._rank_whole(index, weight.new_zeros(()).expand(weight.shape))

    def result(self) -> Ranked:
        """The best entries; fewer than k where fewer have a score above the heuristic's floor."""
        return self.top.result()

    def _vanishes(self) -> bool:
        """Whether an entry's rank falls with its own gradient alone, and is none where that is zero."""
        return self.heuristic.floor == 0 and self.allocation == "global"

    def _rank_whole(self, index: int, gradient: Tensor | None) -> None:
        """Scores every entry."""
        layout = self.table.layout
        weight, start = layout.plain(index), layout.starts[index]
        held = self._held(index)
        bound = quota(self.allocation, weight, self.table.budget, layout.total, held)
        top = self.top if bound.tensor is None else StreamingTopK(min(self.top.k, bound.tensor), self.top.floor)
        columns = as_rows(weight).shape[1]
        for low, w, g in self._blocks(weight, gradient):
            scores = self._exclude(self._scores(index, low, w, g), low, held).view(w.shape)
            scores = bound.apply(scores, low // columns).reshape(-1)
            top.update(scores, start + low, scores if g is None else g.reshape(-1).to(self.table.base.dtype))
        if top is not self.top:
            self.top.merge(top.result())

    def _held(self, index: int) -> Tensor | None:
        """Flat indices, ascending, of what is unmasked and does not compete."""
        members = self.table.members(index) if self.exclude_members else None
        return None if members is None else members.flat

    def _glance(self, index: int, gradient: Tensor) -> bool:
        """Offers what a look at |g| alone does not rule out; False if that cannot be told (yet)."""
        if not self._vanishes() or self.top.least is None:
            return False
        weight = as_rows(self.table.layout.plain(index))
        factor = self.heuristic.bound(weight)
        if factor is None:
            return False
        grads, columns = as_rows(gradient), weight.shape[1]
        across = grads.stride(0) == 1 and grads.shape[0] > 1  # transposed: read it as it lies
        lines = grads.t() if across else grads
        block = GLANCE if lines.device.type == "cpu" else lines.numel()
        height = max(1, block // max(1, lines.shape[1]))
        for low in range(0, lines.shape[0], height):
            part = slice(low, low + height)
            found = self._contenders(index, lines[part], factor)
            if found is not None:
                line, place = found[:, 0] + low, found[:, 1]
                self._offer(index, place * columns + line if across else line * columns + place, lines[line, place])
        return True

    def _contenders(self, index: int, g: Tensor, factor: float) -> Tensor | None:
        """Places (n, 2) of a block's entries that may reach the least score; None if none can."""
        low, high = (x.item() for x in g.aminmax())
        peak = max(-low, high)
        if not math.isfinite(peak):
            raise self._not_finite(index, peak)
        least = self._least() * (1 - 2 * torch.finfo(g.dtype).eps)
        if peak * factor < least:
            return None
        return (g.abs() >= least / factor).nonzero()

    def _rank_factors(self, index: int, gradient: Factors) -> bool:
        """Offers what the factors' norms do not rule out; False if they cannot tell (yet), or rule out too little."""
        if not self._vanishes() or not self.top.least:
            return False
        factor = self.heuristic.bound(self.table.layout.plain(index))
        found = None if factor is None else gradient.above(lambda: self._least() / factor)
        if found is None:
            return False
        for flat, values in found:
            self._offer(index, flat, values)
        return True

    def _least(self) -> float:
        """The score to reach, but for what rounding may lift a score over its ceiling."""
        return (self.top.least or 0.0) * (1 - _ROUNDING)

    def _rank_rows(self, index: int, gradient: Tensor) -> None:
        """Offers the rows that a sparse gradient names."""
        rows, values = gradient.indices()[0], gradient.values()
        columns = values.shape[1]
        weight = self.table.layout.plain(index)
        factor = None if self.top.least is None else self.heuristic.bound(weight[rows])
        height = max(1, BLOCK // columns)
        for low in range(0, rows.numel(), height):
            g = values[low : low + height]
            if factor is not None:
                found = self._contenders(index, g, factor)
                if found is None:
                    continue
                row, column = found[:, 0], found[:, 1]
                self._offer(index, rows[low + row] * columns + column, g[row, column])
            else:
                flat = rows[low : low + height, None] * columns + torch.arange(columns, device=rows.device)
                self._offer(index, flat.view(-1), g.reshape(-1))

    def _offer(self, index: int, flat: Tensor, gradient: Tensor) -> None:
        """Scores entries at flat indices and offers those that are not unmasked yet."""
        held = self._held(index)
        if held is not None:
            free = ~among(flat, held.to(flat.device))
            flat, gradient = flat[free], gradient[free]
        weight = take(self.table.layout.plain(index), flat)
        scores = self._scores(index, 0, weight, gradient)
        self.top.merge(Ranked(scores, flat + self.table.layout.starts[index], gradient.to(self.table.base.dtype)))

    def _blocks(self, weight: Tensor, gradient: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        rows, grads = as_rows(weight), None if gradient is None else as_rows(gradient)
        columns = rows.shape[1]
        if rows.shape[0] == 1 and self.heuristic.elementwise:  # a vector, which may be long: cut it up
            for low in range(0, columns, BLOCK):
                part = slice(low, low + BLOCK)
                yield low, rows[:, part], None if grads is None else grads[:, part]
            return
        height = rows.shape[0] if self._by_tensor() else max(1, BLOCK // columns)
        for row in range(0, rows.shape[0], height):
            part = slice(row, row + height)
            yield row * columns, rows[part], None if grads is None else grads[part]

    def _by_tensor(self) -> bool:
        """Whether a matrix is scored in one block: its scores, or the bounds on its columns, need all of it."""
        return not self.heuristic.elementwise or self.allocation == "column"

    def _scores(self, index: int, low: int, weight: Tensor, gradient: Tensor | None) -> Tensor:
        scores = self.heuristic.score(weight, gradient, (self.step, index, low))
        if scores.shape != weight.shape:
            raise MethodError(
                f"heuristic {self.heuristic.name!r} gave scores of shape {tuple(scores.shape)} for weights of shape "
                f"{tuple(weight.shape)}; it must give one score per weight."
            )
        scores = scores.reshape(-1).to(self.table.base.dtype)
        if scores.numel():
            worst = [s.item() for s in scores.aminmax() if not torch.isfinite(s)]  # NaN propagates
            if worst:
                raise self._not_finite(index, worst[0])
        return scores

    def _not_finite(self, index: int, score: float) -> NonFiniteGradientError:
        return NonFiniteGradientError(
            f"a score of {self.table.layout.names[index]!r} is {score} (heuristic {self.heuristic.name!r}): the loss, "
            "the gradient or the weight is not finite, or the heuristic makes it so"
        )

    def _exclude(self, scores: Tensor, low: int, held: Tensor | None) -> Tensor:
        """Scores without the entries that are unmasked already; a copy, for a heuristic may return the weight itself."""
        if held is None:
            return scores
        edges = torch.tensor([low, low + scores.numel()], device=held.device)
        first, last = torch.searchsorted(held, edges).tolist()
        return scores.index_fill(0, (held[first:last] - low).to(scores.device), -torch.inf)
