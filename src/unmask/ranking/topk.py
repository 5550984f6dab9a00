"""Exact, deterministic, mergeable streaming top-k.

The order is total: score descending, then position ascending. A position is the place of a scalar weight in the
concatenation of all eligible tensors (in name order), so the result does not depend on the order in which blocks
arrive, on how the stream is cut into blocks, or on how a device breaks ties.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The buffer may grow to this many times k before it is cut back to k: one exact cut then serves many updates.
_SLACK = 3
_LARGE = 1 << 18  # a larger k gets half of itself as slack: the buffer is what it costs in memory


class Ranked(NamedTuple):
    """Entries in selection order (score descending, position ascending); all of shape (n,)."""

    scores: Tensor  # float32 or float64
    positions: Tensor  # int64
    payload: Tensor  # same dtype as given, here: the gradient at each position

    def first(self, count: int) -> Ranked:
        """The first ``count`` entries."""
        return Ranked(*(column[:count] for column in self))

    def where(self, kept: Tensor) -> Ranked:
        """The entries for which ``kept`` (n,) is true, in the same order."""
        places = kept.nonzero().squeeze(1)
        return Ranked(*(column[places] for column in self))


class StreamingTopK:
    """Keeps the k first entries of a stream under (score descending, position ascending).

    Entries of score ``-inf`` never enter: that is how a caller excludes some. Memory is O(k + block).

    Args:
        k: How many entries to keep, at least 0.
        floor: Entries of this score or a lower one never enter.

    Example:
        >>> top = StreamingTopK(2)
        >>> top.update(torch.tensor([1.0, 3.0]), 10, torch.tensor([-1.0, -3.0]))
        >>> top.update(torch.tensor([3.0, 2.0]), 0, torch.tensor([-3.0, -2.0]))
        >>> top.result().positions.tolist()   # the tie at 3.0 goes to the smaller position
        [0, 11]
    """

    def __init__(self, k: int, floor: float = -math.inf) -> None:
        self.k, self.floor = k, floor
        self._parts: list[Ranked] = []
        self._size = 0
        self._cutoff: tuple[float, int] | None = None  # (score, position) of the last entry that is in

    def update(self, scores: Tensor, start: int, payload: Tensor) -> None:
        """Offers a block of entries at positions ``start, start + 1, ...``.

        Args:
            scores: (n,) float scores of one contiguous run of positions; NaN must have been refused before.
            start: Position of the first entry.
            payload: (n,) values that travel with the entries.
        """
        if self.k == 0 or scores.numel() == 0:
            return
        keep = self._contenders(scores, start)
        if keep.numel() == 0:
            return
        part = Ranked(scores[keep], keep + start, payload[keep])
        self._append(_first_k(part, self.k))

    def merge(self, entries: Ranked) -> None:
        """Offers entries at arbitrary positions (another stream's result, another process's), none of score ``-inf``."""
        if self._cutoff is not None:
            entries = entries.where(entries.scores >= self._cutoff[0])
        elif self.floor > -math.inf:
            entries = entries.where(entries.scores > self.floor)
        if self.k and entries.scores.numel():
            self._append(_first_k(entries, self.k))

    @property
    def least(self) -> float | None:
        """A score below which nothing can enter any more; None while fewer than k entries are in."""
        return None if self._cutoff is None else self._cutoff[0]

    def result(self) -> Ranked:
        """The first k entries, in order; fewer where fewer were offered."""
        if not self._parts:
            empty = torch.empty(0)
            return Ranked(empty, empty.long(), empty)
        return in_order(_first_k(self._joined(), self.k))

    def _contenders(self, scores: Tensor, start: int) -> Tensor:
        """Indices into ``scores`` of the entries that can still be among the first k."""
        if self._cutoff is None:
            return _first_k_of_block(scores, self.k, self.floor)
        score, position = self._cutoff
        above = (scores > score).nonzero().squeeze(1)
        before = min(scores.numel(), position - start)  # ties count only ahead of the cut-off's position
        if before <= 0:
            return above
        ties = (scores[:before] == score).nonzero().squeeze(1)[: self.k]
        return torch.cat([above, ties]) if ties.numel() else above

    def _append(self, part: Ranked) -> None:
        self._parts.append(part)
        self._size += part.scores.numel()
        limit = _SLACK * self.k if self.k <= _LARGE else self.k + self.k // 2
        if self._size > limit or (self._cutoff is None and self._size >= self.k):
            cut = _first_k(self._joined(), self.k)
            self._parts, self._size = [cut], cut.scores.numel()
            worst = cut.scores.min()
            self._cutoff = (worst.item(), int(cut.positions[cut.scores == worst].max().item()))

    def _joined(self) -> Ranked:
        device = self._parts[0].scores.device
        return Ranked(
            *(torch.cat([column.to(device) for column in columns]) for columns in zip(*self._parts, strict=True))
        )


def _first_k_of_block(scores: Tensor, k: int, floor: float) -> Tensor:
    """Indices of the first k of a block whose positions ascend; ``floor`` and what is below it are left out."""
    if scores.numel() <= k:
        return (scores > floor).nonzero().squeeze(1)
    cut = scores.topk(k, sorted=False).values.min()
    if cut <= floor:
        return (scores > floor).nonzero().squeeze(1)
    above = (scores > cut).nonzero().squeeze(1)
    ties = (scores == cut).nonzero().squeeze(1)[: k - above.numel()]
    return torch.cat([above, ties])


def _first_k(entries: Ranked, k: int) -> Ranked:
    """The first k entries under the total order, themselves in any order; none is ``-inf``."""
    scores = entries.scores
    if scores.numel() <= k:
        return entries
    cut = scores.topk(k, sorted=False).values.min()
    above = (scores > cut).nonzero().squeeze(1)
    ties = (scores == cut).nonzero().squeeze(1)
    room = k - above.numel()
    if ties.numel() > room:
        ties = ties[entries.positions[ties].argsort()[:room]]
    keep = torch.cat([above, ties])
    return Ranked(*(column[keep] for column in entries))


def in_order(entries: Ranked) -> Ranked:
    """Entries sorted by the total order: score descending, then position ascending."""
    by_position = entries.positions.argsort()
    by_score = entries.scores[by_position].argsort(descending=True, stable=True)
    order = by_position[by_score]
    return Ranked(*(column[order] for column in entries))
