"""Keeps the k best entries of a stream: exactly, in an order without ties, and in parts that can be merged."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The buffer may grow to this many times k before it is cut back to k. So one exact cut serves many updates.
_SLACK = 3
_LARGE = 1 << 18  # For a larger k, whose buffer takes memory, the slack is half of k.


class Ranked(NamedTuple):
    """Entries in selection order: score descending, then position ascending.

    Attributes:
        scores: (n,) float32 or float64.
        positions: (n,) int64.
        payload: (n,) values that travel with the entries, in their own dtype; in a selection, the gradients.
    """

    scores: Tensor
    positions: Tensor
    payload: Tensor

    def first(self, count: int) -> Ranked:
        """Returns the first ``count`` entries."""
        return Ranked(*(column[:count] for column in self))

    def where(self, kept: Tensor) -> Ranked:
        """Returns the entries for which ``kept`` (n,) is True, in the same order."""
        places = kept.nonzero().squeeze(1)
        return Ranked(*(column[places] for column in self))


class StreamingTopK:
    """Keeps the k first entries of a stream under (score descending, position ascending).

    The order is total, so the result does not depend on the order of the blocks, on how the stream is cut into them, or on how a
    device breaks ties. Entries of score ``-inf`` never enter, so that a caller can exclude some. Memory is O(k + block).

    Args:
        k: The number of entries to keep, at least 0.
        floor: The score that an entry must exceed to enter.

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
        self._cutoff: tuple[float, int] | None = None  # The (score, position) of the last of the first k entries.

    def update(self, scores: Tensor, start: int, payload: Tensor) -> None:
        """Offers a block of entries at positions ``start, start + 1, ...``.

        The float scores and the values that travel with the entries are (n,). The caller must have refused NaN.
        """
        if self.k == 0 or scores.numel() == 0:
            return
        keep = self._contenders(scores, start)
        if keep.numel():
            self._append(_first_k(Ranked(scores[keep], keep + start, payload[keep]), self.k))

    def merge(self, entries: Ranked) -> None:
        """Offers entries at any positions, of which none has the score ``-inf``: another stream's or process's result."""
        if self._cutoff is not None:
            entries = entries.where(entries.scores >= self._cutoff[0])
        elif self.floor > -math.inf:
            entries = entries.where(entries.scores > self.floor)
        if self.k and entries.scores.numel():
            self._append(_first_k(entries, self.k))

    @property
    def least(self) -> float | None:
        """The score below which no entry can enter any more; None while there are fewer than k entries."""
        return None if self._cutoff is None else self._cutoff[0]

    def result(self) -> Ranked:
        """Returns the first k entries, in order; fewer if fewer were offered."""
        if not self._parts:
            empty = torch.empty(0)
            return Ranked(empty, empty.long(), empty)
        return in_order(_first_k(self._joined(), self.k))

    def _contenders(self, scores: Tensor, start: int) -> Tensor:
        """Returns the indices, in ``scores``, of the entries that can still be among the first k."""
        if self._cutoff is None:
            cut = scores.topk(self.k, sorted=False).values.min() if scores.numel() > self.k else None
            if cut is None or cut <= self.floor:
                return (scores > self.floor).nonzero().squeeze(1)
            above = (scores > cut).nonzero().squeeze(1)
            ties = (scores == cut).nonzero().squeeze(1)[: self.k - above.numel()]
            return torch.cat([above, ties])
        score, position = self._cutoff
        above = (scores > score).nonzero().squeeze(1)
        before = min(scores.numel(), position - start)  # A tie counts only at a smaller position than the cut-off's.
        if before <= 0:
            return above
        ties = (scores[:before] == score).nonzero().squeeze(1)[: self.k]
        return torch.cat([above, ties]) if ties.numel() else above

    def _append(self, part: Ranked) -> None:
        """Adds entries to the buffer, and cuts it back to the first k if it is full."""
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
        columns = zip(*self._parts, strict=True)
        return Ranked(*(torch.cat([part.to(device) for part in column]) for column in columns))


def _first_k(entries: Ranked, k: int) -> Ranked:
    """Returns the first k entries under the total order, unordered themselves. No score may be ``-inf``."""
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
    """Returns entries sorted by the total order: score descending, then position ascending."""
    by_position = entries.positions.argsort()
    by_score = entries.scores[by_position].argsort(descending=True, stable=True)
    order = by_position[by_score]
    return Ranked(*(column[order] for column in entries))
