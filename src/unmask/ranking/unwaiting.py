"""Ranks the entries of many tensors without making the host wait for a device, by operations whose sizes the host knows.

A GPU works through a queue. An operation whose result's size depends on data (``nonzero``, a boolean mask, ``item``) makes the
host wait until the queue is empty, and then the GPU waits for the host. `Ranker` uses such operations, for on a CPU they save
work. This ranking does the same work for every block, and reads one small tensor at the end.
"""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate

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
from unmask.ranking.triton_ranker import TritonRanker, serves

# These three are upper bounds. A smaller model has a 64th of its weights, or _LEAST, in their place: so a ranking takes little
# memory next to the model's backward.
BLOCK = 1 << 24  # The scalar weights that are scored at a time; temporaries take about 16 bytes each.
_SMALL = 1 << 22  # The scalar weights below which tensors are ranked together; their gradients are kept meanwhile.
_MERGE = 1 << 20  # The entries that may wait to be merged; 3 k if that is more.
_LEAST = 1 << 16


@dataclass(frozen=True)
class _Block:
    """Entries that are ranked at once: all of some small tensors, or consecutive ones of one tensor.

    Attributes:
        tensors: The tensors' indices.
        offsets: Where each begins in the block.
        low: The flat index of the first entry, of one tensor.
        size: The number of entries.
    """

    tensors: list[int]
    offsets: list[int]
    low: int
    size: int


def new_ranker(method: Method, table: Ledger, keep: int, step: int, exclude_members: bool) -> Ranker:
    """Returns the ranking of one process on the device of the table's values; the arguments are those of `Ranker`.

    Where the host should not wait for the device, it is a `TritonRanker` on CUDA and an `UnwaitingRanker` elsewhere. An
    allocation that bounds the share of tensors, rows or columns, and a heuristic that looks at whole tensors, are ranked by a
    `Ranker` on every device.
    """
    backend = backend_of(table.values.device)
    if backend.asks or method.allocation != "global" or not method.heuristic.elementwise:
        return Ranker(method.heuristic, table, method.allocation, keep, step, exclude_members)
    kind = TritonRanker if backend.name == "cuda" and serves(table, keep) else UnwaitingRanker
    return kind(method.heuristic, table, keep, step, exclude_members)


class UnwaitingRanker(Ranker):
    """Ranks as a `Ranker` does under the allocation ``"global"``, for a heuristic that scores entries one by one.

    Small tensors are ranked together, for an operation on a GPU costs the host as much time on a small one as on a large one.
    """

    def __init__(self, heuristic: Heuristic, table: Ledger, keep: int, step: int, exclude_members: bool) -> None:
        super().__init__(heuristic, table, "global", keep, step, exclude_members)
        self._parts: list[Ranked] = []
        self._blocks_read: list[
            tuple[_Block, Tensor]
        ] = []  # with (least score, largest, place of the first that is not finite)
        self._small: list[tuple[int, Tensor | None]] = []
        self._size = 0  # of the small tensors that wait
        share = max(_LEAST, table.layout.total // 64)
        self._block, self._joined, self._waiting = (min(share, most) for most in (BLOCK, _SMALL, _MERGE))

    def rank(self, index: int, gradient: Tensor | Factors | None) -> None:
        """Offers one tensor's entries, as `Ranker.rank` does. A score that is not finite is refused by `result`."""
        self._rank_whole(index, None if gradient is None else as_dense(gradient))

    def _rank_whole(self, index: int, gradient: Tensor | None) -> None:
        weight = self.table.layout.plain(index)
        size = weight.numel()
        if not size:
            return
        # A quantised weight is read in rows, and random numbers follow from the tensor; neither can be joined with others.
        if size < self._joined and type(weight) is Tensor and self.heuristic.needs != "nothing":
            if self._small and not self._like_the_small(weight, gradient):
                self._rank_small()
            self._small.append((index, gradient))
            self._size += size
            if self._size >= self._joined:
                self._rank_small()
            return
        rows, grads = as_rows(weight), None if gradient is None else as_rows(gradient)
        if rows.shape[0] == 1 and type(weight) is Tensor:  # a vector may be long
            rows, grads = rows.t(), None if grads is None else grads.t()
        columns = rows.shape[1]
        height = max(1, self._block // columns)
        for row in range(0, rows.shape[0], height):
            w, g = rows[row : row + height], None if grads is None else grads[row : row + height]
            self._rank_block(_Block([index], [0], row * columns, w.numel()), w, g)

    def _like_the_small(self, weight: Tensor, gradient: Tensor | None) -> bool:
        """Returns True if a tensor can be joined with the small ones that wait."""
        index, other = self._small[-1]
        first = self.table.layout.plain(index)
        alike = weight.dtype == first.dtype and weight.device == first.device
        return alike and (gradient is None) == (other is None) and (other is None or gradient.dtype == other.dtype)  # type: ignore[union-attr]

    def _rank_small(self) -> None:
        """Ranks the small tensors that wait, as one block."""
        waiting, self._small, self._size = sorted(self._small, key=lambda small: small[0]), [], 0  # as positions are
        if waiting:
            weights = [self.table.layout.plain(index).reshape(-1) for index, _ in waiting]
            gradients = [gradient.reshape(-1) for _, gradient in waiting if gradient is not None]
            offsets = [0, *accumulate(weight.numel() for weight in weights)]
            block = _Block([index for index, _ in waiting], offsets[:-1], 0, offsets[-1])
            self._rank_block(block, torch.cat(weights), torch.cat(gradients) if gradients else None)

    def _rank_block(self, block: _Block, weight: Tensor, gradient: Tensor | None) -> None:
        dtype = self.table.base.dtype
        scores = self._unchecked_scores(block.tensors[0], block.low, weight, gradient)
        broken = (~torch.isfinite(scores)).to(torch.uint8).argmax()
        self._blocks_read.append((block, torch.stack([*scores.aminmax(), broken]).double()))
        scores = self._competing(block, scores)
        places = first_places(scores, min(self.top.k, block.size))
        best = scores[places]
        starts = [
            self.table.layout.starts[index] - offset for index, offset in zip(block.tensors, block.offsets, strict=True)
        ]
        if len(starts) == 1:
            positions = places + (starts[0] + block.low)
        else:
            # A copy that blocks would make the host wait for the device.
            bounds, shifts = torch.tensor([block.offsets, starts]).to(places.device, non_blocking=True)
            positions = places + shifts[torch.bucketize(places, bounds, right=True) - 1]
        self._parts.append(Ranked(best, positions, best if gradient is None else take(gradient, places).to(dtype)))
        if sum(part.scores.numel() for part in self._parts) > max(self._waiting, 3 * self.top.k):
            self._parts = [self._merged()]

    def _competing(self, block: _Block, scores: Tensor) -> Tensor:
        """Returns a block's scores with those of entries that do not compete set to -inf."""
        held = [(self._held(index), offset) for index, offset in zip(block.tensors, block.offsets, strict=True)]
        moved = [flat.to(scores.device) + (offset - block.low) for flat, offset in held if flat is not None]
        if not moved:
            return scores
        places = moved[0] if len(moved) == 1 else torch.cat(moved)
        if len(block.tensors) > 1:
            return scores.index_fill(0, places, -torch.inf)
        # A part of a tensor: the places outside fall on one behind the end.
        places = torch.where((places >= 0) & (places < block.size), places, block.size)
        return torch.cat([scores, scores.new_zeros(1)]).index_fill_(0, places, -torch.inf)[: block.size]

    def result(self) -> Ranked:
        """Returns the k best entries; fewer if fewer have a score above the heuristic's floor. The host waits once.

        Raises:
            NonFiniteGradientError: A score is NaN or infinite.
        """
        self._rank_small()
        if not self._parts:
            empty = self.table.base[:0]
            return Ranked(empty, empty.long(), empty)
        ranked = self._merged()
        count = (ranked.scores > self.heuristic.floor).sum().double()[None]
        read = torch.cat([count, *(found.to(count.device) for _, found in self._blocks_read)]).tolist()
        for (block, _), least, largest, broken in zip(
            self._blocks_read, read[1::3], read[2::3], read[3::3], strict=True
        ):
            for score in (least, largest):
                if not math.isfinite(score):
                    raise self._not_finite(block.tensors[bisect(block.offsets, broken) - 1], score)
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
