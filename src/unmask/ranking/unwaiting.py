"""Ranks the entries of many tensors without making the host wait for a device, by operations whose sizes the host knows.

A GPU works through a queue. An operation whose result's size depends on data (``nonzero``, a boolean mask, ``item``) makes the
host wait until the queue is empty, and then the GPU waits for the host. `Ranker` uses such operations, for on a CPU they save
work. This ranking does the same work for every block, and reads one small tensor at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unmask.gradients.backend import backend_of
from unmask.gradients.entries import as_rows, take
from unmask.gradients.factors import Factors, as_dense
from unmask.methods.heuristics import Heuristic
from unmask.methods.method import Method
from unmask.ranking.ledger import Ledger
from unmask.ranking.ranker import Ranker
from unmask.ranking.topk import Ranked

BLOCK = 1 << 24  # The scalar weights that are scored at a time; temporaries take about 16 bytes each.
_MERGE = 1 << 20  # The entries that may wait to be merged, at least.


def ranks_unasked(method: Method, device: torch.device) -> bool:
    """Returns True if a method is ranked on a device by an `UnwaitingRanker`.

    It is where the host should not wait for the device. An allocation that bounds the share of tensors, rows or columns, and a
    heuristic that looks at whole tensors, are ranked by a `Ranker` on every device.
    """
    return not backend_of(device).asks and method.allocation == "global" and method.heuristic.elementwise


class UnwaitingRanker(Ranker):
    """Ranks as a `Ranker` does under the allocation ``"global"``, for a heuristic that scores entries one by one."""

    def __init__(self, heuristic: Heuristic, table: Ledger, keep: int, step: int, exclude_members: bool) -> None:
        super().__init__(heuristic, table, "global", keep, step, exclude_members)
        self._parts: list[Ranked] = []
        self._extremes: list[tuple[int, Tensor]] = []  # for each block its tensor, and its least and largest score

    def rank(self, index: int, gradient: Tensor | Factors | None) -> None:
        """Offers one tensor's entries, as `Ranker.rank` does. A score that is not finite is refused by `result`."""
        self._rank_whole(index, None if gradient is None else as_dense(gradient))

    def _rank_whole(self, index: int, gradient: Tensor | None) -> None:
        weight, start, held = self.table.layout.plain(index), self.table.layout.starts[index], self._held(index)
        rows, grads = as_rows(weight), None if gradient is None else as_rows(gradient)
        if rows.shape[0] == 1:  # a vector may be long
            rows, grads = rows.t(), None if grads is None else grads.t()
        columns, dtype = rows.shape[1], self.table.base.dtype
        height = max(1, BLOCK // max(1, columns))
        for row in range(0, rows.shape[0] if columns else 0, height):
            low, w = row * columns, rows[row : row + height]
            g = None if grads is None else grads[row : row + height]
            scores = self._unchecked_scores(index, low, w, g)
            self._extremes.append((index, torch.stack(scores.aminmax())))
            if held is not None:
                scores = _without(scores, held, low)
            places = first_places(scores, min(self.top.k, scores.numel()))
            best = scores[places]
            self._parts.append(Ranked(best, places + (start + low), best if g is None else take(g, places).to(dtype)))
        if sum(part.scores.numel() for part in self._parts) > max(_MERGE, 3 * self.top.k):
            self._parts = [self._merged()]

    def result(self) -> Ranked:
        """Returns the k best entries; fewer if fewer have a score above the heuristic's floor. The host waits once.

        Raises:
            NonFiniteGradientError: A score is NaN or infinite.
        """
        if not self._parts:
            empty = self.table.base[:0]
            return Ranked(empty, empty.long(), empty)
        ranked = self._merged()
        count = (ranked.scores > self.heuristic.floor).sum()
        device = ranked.scores.device
        read = torch.cat(
            [count.double()[None], *(pair.to(device, torch.float64) for _, pair in self._extremes)]
        ).tolist()
        for (index, _), *pair in zip(self._extremes, read[1::2], read[2::2], strict=True):
            for extreme in pair:
                if not math.isfinite(extreme):
                    raise self._not_finite(index, extreme)
        return ranked.first(int(read[0]))

    def _merged(self) -> Ranked:
        """Returns the first k of what was offered, in order; entries of score -inf at the end, if there are too few."""
        device = self._parts[0].scores.device
        scores, positions, payload = (
            torch.cat([c.to(device) for c in column]) for column in zip(*self._parts, strict=True)
        )
        by_position = positions.argsort()
        order = by_position[scores[by_position].argsort(descending=True, stable=True)][: self.top.k]
        return Ranked(scores[order], positions[order], payload[order])


def first_places(scores: Tensor, k: int) -> Tensor:
    """Returns the places of the k largest scores, ascending; among equal ones the first. The host does not wait.

    The scores are (n,), with k of at most n. If one is NaN, the places say nothing.

    Example:
        >>> first_places(torch.tensor([1.0, 3.0, 2.0, 1.0, 1.0]), 3).tolist()
        [0, 1, 2]
    """
    n = scores.numel()
    if k == n:
        return torch.arange(n, device=scores.device)
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    cut = scores.topk(k, sorted=False).values.min()
    chosen, ties = scores > cut, scores == cut
    count = torch.int32 if n < 1 << 31 else torch.int64
    room = k - chosen.sum()
    chosen |= ties & (ties.cumsum(0, dtype=count) <= room)
    numbers = torch.arange(1, k + 1, dtype=count, device=scores.device)
    return torch.searchsorted(chosen.cumsum(0, dtype=count), numbers).clamp_(max=n - 1)


def _without(scores: Tensor, flat: Tensor, low: int) -> Tensor:
    """Returns the scores (n,) of a block from the flat index ``low`` on, with those at the flat indices set to -inf."""
    n = scores.numel()
    places = flat.to(scores.device) - low
    places = torch.where(
        (places >= 0) & (places < n), places, n
    )  # those of other blocks fall on a place behind the end
    return torch.cat([scores, scores.new_zeros(1)]).index_fill_(0, places, -torch.inf)[:n]
