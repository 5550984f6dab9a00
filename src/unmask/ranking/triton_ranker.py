"""Ranks the entries of many tensors on CUDA devices by the kernels of `unmask.ranking.triton_buffer`; the host waits once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from unmask.gradients.entries import as_rows
from unmask.gradients.factors import Factors, as_dense
from unmask.methods.heuristics import Heuristic, d3, gradient_magnitude, snip
from unmask.ranking.ledger import Ledger
from unmask.ranking.ranker import Ranker
from unmask.ranking.topk import Ranked, in_order
from unmask.ranking.triton_buffer import DTYPES, GIVEN, BestBuffer, Formula, Sizes, available

_DTYPES = set(DTYPES)
_BROKEN = (0.0, math.inf, -math.inf, math.nan)  # as the status of a buffer numbers them
_MOST = 1 << 29  # The largest k: a buffer's places are 32-bit integers.


def serves(table: Ledger, keep: int) -> bool:
    """Returns True if a `TritonRanker` can rank the tensors of a table: all are on devices that Triton runs on."""
    with torch._C.DisableTorchFunctionSubclass():
        devices = {tensor.device for tensor in table.layout.tensors}
    return table.base.dtype == torch.float32 and keep < _MOST and all(available(device) for device in devices)


def formula_of(heuristic: Heuristic) -> Formula:
    """Returns the formula by which the kernel scores, bit for bit as the heuristic does; `GIVEN` if torch has to score.

    Example:
        >>> from unmask.methods.heuristics import heuristic
        >>> formula_of(heuristic("d3", eps=0.5))
        Formula(kind='d3', eps=0.5, power=2)
        >>> formula_of(heuristic("d3", exp=0.3)) is GIVEN
        True
    """
    if heuristic.function is gradient_magnitude:
        return Formula("gradient")
    if heuristic.function is snip:
        return Formula("snip")
    if heuristic.function is not d3:
        return GIVEN
    eps, exp = (float({"eps": 1.0, "exp": 2.0, **heuristic.parameters}[name]) for name in ("eps", "exp"))
    if exp == 0:
        return Formula("gradient")
    return Formula("d3", eps, int(exp)) if exp in (-1, 1, 2) else GIVEN


class TritonRanker(Ranker):
    """Ranks as a `Ranker` does under the allocation ``"global"``, for a heuristic that scores entries one by one.

    A tensor's gradient is not kept after it was offered. Each device has a `BestBuffer`, and `result` merges them.
    """

    def __init__(self, heuristic: Heuristic, table: Ledger, keep: int, step: int, exclude_members: bool) -> None:
        super().__init__(heuristic, table, "global", keep, step, exclude_members)
        self._formula = formula_of(heuristic)
        self._sizes = Sizes.of(keep, table.layout.total)
        self._buffers: dict[torch.device, BestBuffer] = {}
        self._order: list[int] = []  # of the tensors, as they were offered
        self._seen = 0  # entries offered

    def rank(self, index: int, gradient: Tensor | Factors | None) -> None:
        """Offers one tensor's entries, as `Ranker.rank` does. A score that is not finite is refused by `result`."""
        self._rank_whole(index, None if gradient is None else as_dense(gradient))

    def _rank_whole(self, index: int, gradient: Tensor | None) -> None:
        weight = self.table.layout.plain(index)
        if not weight.numel():
            return
        self._order.append(index)
        if weight.device not in self._buffers:
            tensors = len(self.table.layout.tensors)
            self._buffers[weight.device] = BestBuffer(self._sizes, self.heuristic.floor, tensors, weight.device)
        buffer = self._buffers[weight.device]
        held, start = self._held(index), self.table.layout.starts[index]
        members = None if held is None else held.to(weight.device)
        for first, w, g in self._blocks_of(weight, gradient):
            formula = self._formula if g is not None and {w.dtype, g.dtype} <= _DTYPES else GIVEN
            # A heuristic may return scores with any strides, e.g. one number that stands for all.
            other = self._unchecked_scores(index, first, w, g).contiguous() if formula is GIVEN else w
            buffer.offer(index, start, first, other if g is None else g, other, members, formula)

    def _blocks_of(self, weight: Tensor, gradient: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yields consecutive entries as contiguous vectors: (flat index of the first, weights, gradients).

        Until a cut-off is known every entry enters the buffer, so the first blocks are small. A power of two keeps the next
        block aligned in memory.
        """
        for first, w, g in self._vectors(weight, gradient):
            low = 0
            while low < w.numel():
                seen = max(self._seen, self._sizes.full)
                size = min(1 << (seen.bit_length() - 1), self._sizes.room, w.numel() - low)
                yield first + low, w[low : low + size], None if g is None else g[low : low + size]
                low += size
                self._seen += size

    def _vectors(self, weight: Tensor, gradient: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yields the entries as contiguous vectors: one of all, or where they must be copied, one of some rows at a time."""
        if type(weight) is Tensor and weight.is_contiguous() and (gradient is None or gradient.is_contiguous()):
            yield 0, weight.view(-1), None if gradient is None else gradient.view(-1)
            return
        rows, grads = as_rows(weight), None if gradient is None else as_rows(gradient)
        columns = rows.shape[1]
        height = max(1, self._sizes.room // columns)
        for row in range(0, rows.shape[0], height):
            part = slice(row, row + height)
            g = None if grads is None else grads[part].reshape(-1).contiguous()
            yield row * columns, rows[part].reshape(-1).contiguous(), g

    def result(self) -> Ranked:
        """Returns the k best entries; fewer if fewer have a score above the heuristic's floor. The host waits once.

        Raises:
            NonFiniteGradientError: A score is NaN or infinite.
        """
        buffers = list(self._buffers.values())
        if not buffers:
            empty = self.table.base[:0]
            return Ranked(empty, empty.long(), empty)
        for buffer in buffers:
            buffer.cut_back()
        device = buffers[0].status.device
        statuses = torch.stack([buffer.status.to(device) for buffer in buffers]).tolist()
        for index in self._order:
            broken = max(status[1 + index] for status in statuses)
            if broken:
                raise self._not_finite(index, _BROKEN[broken])
        found = [buffer.ranked(status[0]) for buffer, status in zip(buffers, statuses, strict=True)]
        if len(found) == 1:
            return found[0]
        columns = [torch.cat([part.to(device) for part in column]) for column in zip(*found, strict=True)]
        return in_order(Ranked(*columns)).first(self._sizes.keep)
