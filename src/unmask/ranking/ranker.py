"""Ranks the entries of many tensors by the score of a heuristic, one tensor's gradient at a time, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from unmask.errors import MethodError, NonFiniteGradientError
from unmask.gradients.entries import among, as_rows, take
from unmask.gradients.factors import Factors, as_dense
from unmask.methods.heuristics import Heuristic, largest
from unmask.methods.method import Allocation
from unmask.ranking.ledger import Ledger
from unmask.ranking.quotas import quota
from unmask.ranking.topk import Ranked, StreamingTopK

BLOCK = 1 << 20  # The scalar weights that are scored at a time.
GLANCE = 1 << 18  # The scalar gradients of one look on a CPU: few enough for its cache.
_ROUNDING = 1e-4  # How far rounding may lift a score over its ceiling, as a share of it.


class Ranking(Protocol):
    """Ranks the entries of many tensors by their gradient; several processes use those of `unmask.distributed.ranking`."""

    def rank(self, index: int, gradient: Tensor | Factors) -> None:
        """Offers one tensor's entries by its gradient, which is dense, sparse in rows, or `Factors`."""

    def rank_zero(self, index: int) -> None:
        """Offers a tensor that this process's loss did not reach."""

    def result(self) -> Ranked:
        """Returns the best entries, the same in all processes, with the gradient by which all of them train."""


class Ranker:
    """Ranks the entries of many tensors, one after the other, under one budget. Temporaries have the size of a block.

    Once k entries are known, their least score rules out others. Where the heuristic has a `ceiling`, the largest |g| of a block
    tells whether any of its entries can reach that score, and only the entries that can are scored.

    Args:
        heuristic: The heuristic that scores entries.
        table: The layout of the eligible tensors, and what is unmasked already.
        allocation: The way in which the budget is spread.
        keep: The number k of entries to keep.
        step: The optimizer step; it seeds random heuristics.
        exclude_members: Leaves out what is unmasked already (increment-S); repeat-S ranks everything.
    """

    def __init__(
        self, heuristic: Heuristic, table: Ledger, allocation: Allocation, keep: int, step: int, exclude_members: bool
    ) -> None:
        self.heuristic, self.table, self.allocation = heuristic, table, allocation
        self.step, self.exclude_members = step, exclude_members
        self.top = StreamingTopK(keep, heuristic.floor)
        self._outside: dict[int, Tensor | None] = {}  # what does not compete, as far as it was asked for
        # True if an entry's rank falls with its own gradient alone, and a gradient of zero gives it none.
        self._vanishes = heuristic.floor == 0 and allocation == "global"

    def rank(self, index: int, gradient: Tensor | Factors | None) -> None:
        """Offers one tensor's entries.

        Args:
            index: The index of the tensor.
            gradient: The tensor's gradient, with any strides and float dtype: dense, sparse in whole rows (an embedding's,
                coalesced), or the factors of a product; None for a heuristic that needs none.

        Raises:
            NonFiniteGradientError: A score is NaN or infinite.
            MethodError: The heuristic's scores have another shape than the weight.
        """
        if isinstance(gradient, Tensor) and gradient.is_sparse and self._vanishes:
            self._rank_rows(index, gradient)
            return
        weight = self.table.layout.plain(index)
        bounded = self._vanishes and self.top.least is not None and weight.ndim > 1 and weight.numel() > 0
        factor = self.heuristic.bound(weight) if bounded else None
        if isinstance(gradient, Factors) and factor is not None and self.top.least:
            pieces = gradient.above(lambda: self._least() / factor)
            if pieces is not None:  # Otherwise the factors' norms rule out too little.
                for flat, values in pieces:
                    self._offer(index, flat, values)
                return
        whole = None if gradient is None else as_dense(gradient)
        if whole is None or factor is None:
            self._rank_whole(index, whole)
            return
        grads, columns = as_rows(whole), as_rows(weight).shape[1]
        if grads.stride(0) == 1 and grads.shape[0] > 1:  # A transposed one is read in the order of its memory.
            self._look(index, grads.t(), factor, lambda line, place: place * columns + line)
        else:
            self._look(index, grads, factor, lambda line, place: line * columns + place)

    def rank_zero(self, index: int) -> None:
        """Offers a tensor that the loss did not reach: its gradient is zero, which may rule out all of it."""
        if self.heuristic.floor < 0:
            weight = self.table.layout.plain(index)
            self._rank_whole(index, weight.new_zeros(()).expand(weight.shape))

    def result(self) -> Ranked:
        """Returns the k best entries; fewer if fewer have a score above the heuristic's floor."""
        return self.top.result()

    def _rank_whole(self, index: int, gradient: Tensor | None) -> None:
        """Scores every entry."""
        layout = self.table.layout
        weight, start = layout.plain(index), layout.starts[index]
        held = self._held(index)
        unmasked = self._unmasked(index)
        bound = quota(self.allocation, weight, self.table.budget, layout.free, unmasked, layout.avoided(index))
        top = self.top if bound.tensor is None else StreamingTopK(min(self.top.k, bound.tensor), self.top.floor)
        columns = as_rows(weight).shape[1]
        for low, w, g in self._blocks(weight, gradient):
            scores = self._scores(index, low, w, g)
            if held is not None:  # A copy without them, for a heuristic may return the weight itself.
                edges = torch.tensor([low, low + scores.numel()], device=held.device)
                first, last = torch.searchsorted(held, edges).tolist()
                scores = scores.index_fill(0, (held[first:last] - low).to(scores.device), -torch.inf)
            scores = bound.apply(scores.view(w.shape), low // columns).reshape(-1)
            top.update(scores, start + low, scores if g is None else g.reshape(-1).to(self.table.base.dtype))
        if top is not self.top:
            self.top.merge(top.result())

    def _unmasked(self, index: int) -> Tensor | None:
        """Returns the flat indices, ascending, of what is unmasked and therefore does not compete; None if nothing is."""
        members = self.table.members(index) if self.exclude_members else None
        return None if members is None else members.flat

    def _held(self, index: int) -> Tensor | None:
        """Returns the flat indices, ascending, of what does not compete: what is unmasked, or avoided. None if all competes."""
        avoided = self.table.layout.avoided(index)
        if avoided is None:
            return self._unmasked(index)
        if index not in self._outside:
            unmasked = self._unmasked(index)
            self._outside[index] = avoided if unmasked is None else torch.cat([avoided, unmasked]).sort().values
        return self._outside[index]

    def _blocks(self, weight: Tensor, gradient: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Cuts a weight and its gradient into blocks of consecutive entries: (flat index of the first, weights, gradients)."""
        rows, grads = as_rows(weight), None if gradient is None else as_rows(gradient)
        columns = rows.shape[1]
        if rows.shape[0] == 1 and self.heuristic.elementwise:  # A vector may be long, so it is cut up.
            for low in range(0, columns, BLOCK):
                part = slice(low, low + BLOCK)
                yield low, rows[:, part], None if grads is None else grads[:, part]
            return
        # A matrix comes in one block if its scores, or the bounds on its columns, need all of it.
        at_once = not self.heuristic.elementwise or self.allocation == "column"
        height = rows.shape[0] if at_once else max(1, BLOCK // columns)
        for row in range(0, rows.shape[0], height):
            part = slice(row, row + height)
            yield row * columns, rows[part], None if grads is None else grads[part]

    def _look(self, index: int, lines: Tensor, factor: float, flat: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Offers those gradients of a matrix that may reach the least score, at the flat indices ``flat(line, place)``."""
        block = GLANCE if lines.device.type == "cpu" else lines.numel()
        height = max(1, block // max(1, lines.shape[1]))
        for low in range(0, lines.shape[0], height):
            g = lines[low : low + height]
            peak = largest(g)
            if not math.isfinite(peak):
                raise self._not_finite(index, peak)
            least = self._least() * (1 - 2 * torch.finfo(g.dtype).eps)
            if peak * factor >= least:
                line, place = (g.abs() >= least / factor).nonzero().unbind(1)
                self._offer(index, flat(line + low, place), g[line, place])

    def _least(self) -> float:
        """Returns the score to reach, less what rounding may lift a score over its ceiling."""
        return (self.top.least or 0.0) * (1 - _ROUNDING)

    def _rank_rows(self, index: int, gradient: Tensor) -> None:
        """Offers the rows that a sparse gradient holds."""
        rows, values = gradient.indices()[0], gradient.values()
        if not rows.numel():  # All tokens of an embedding were padding.
            return
        columns = values.shape[1]
        factor = None if self.top.least is None else self.heuristic.bound(self.table.layout.plain(index)[rows])
        if factor is not None:
            self._look(index, values, factor, lambda line, place: rows[line] * columns + place)
            return
        height = max(1, BLOCK // columns)
        for low in range(0, rows.numel(), height):
            flat = rows[low : low + height, None] * columns + torch.arange(columns, device=rows.device)
            self._offer(index, flat.view(-1), values[low : low + height].reshape(-1))

    def _offer(self, index: int, flat: Tensor, gradient: Tensor) -> None:
        """Scores entries at flat indices and offers those that are not unmasked yet."""
        held = self._held(index)
        if held is not None:
            free = ~among(flat, held.to(flat.device))
            flat, gradient = flat[free], gradient[free]
        weight = take(self.table.layout.plain(index), flat)
        scores = self._scores(index, 0, weight, gradient)
        self.top.merge(Ranked(scores, flat + self.table.layout.starts[index], gradient.to(self.table.base.dtype)))

    def _scores(self, index: int, low: int, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """Returns the scores of a block whose first entry has the flat index ``low``: (n,). All of them are finite."""
        scores = self._unchecked_scores(index, low, weight, gradient)
        if scores.numel():
            worst = [s.item() for s in scores.aminmax() if not torch.isfinite(s)]  # NaN propagates through aminmax.
            if worst:
                raise self._not_finite(index, worst[0])
        return scores

    def _unchecked_scores(self, index: int, low: int, weight: Tensor, gradient: Tensor | None) -> Tensor:
        scores = self.heuristic.score(weight, gradient, (self.step, index, low))
        if scores.shape != weight.shape:
            raise MethodError(
                f"heuristic {self.heuristic.name!r} gave scores of shape {tuple(scores.shape)} for weights of shape "
                f"{tuple(weight.shape)}; it must give one score per weight."
            )
        return scores.reshape(-1).to(self.table.base.dtype)

    def _not_finite(self, index: int, score: float) -> NonFiniteGradientError:
        return NonFiniteGradientError(
            f"a score of {self.table.layout.names[index]!r} is {score} (heuristic {self.heuristic.name!r}). The loss, the "
            "gradient or the weight is not finite, or the heuristic makes the score so."
        )


NewRanker = Callable[[Ledger], Ranker]
"""Makes a process's own ranker, of a table that tells what is unmasked already."""
