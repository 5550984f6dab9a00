"""One ranking by the mean gradient of several processes, with or without sending the whole of it.

- `ExactRanking`: tensors' gradients are reduced, a bucket at a time, as they arrive; every process ranks the same numbers. Wire:
  the dense gradient, as under DDP. Memory: a bucket.
- `CandidateRanking`: of each bucket every process offers what is among the first k of its own gradient so far; the mean gradient
  of what anybody offered is formed while the bucket is still there, and ranked. Wire: O(k) per process. Memory: a bucket. What
  is ranked has its exact score; an entry that is not among the first k of any process is not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.distributed.processes import Processes
from unmask.distributed.rounds import Arrival, Rounds
from unmask.errors import NonFiniteGradientError
from unmask.gradients.factors import Factors, as_dense, gradient_at
from unmask.gradients.reducing import NewRanker, Ranking
from unmask.slots import SlotTable
from unmask.topk import Ranked, StreamingTopK


class ExactRanking:
    """Ranks by the reduced dense gradient.

    Args:
        processes: Whose mean it is.
        ranking: What ranks the reduced gradients, the same in all processes.
        table: The tensors.
    """

    def __init__(self, processes: Processes, ranking: Ranking, table: SlotTable) -> None:
        self._processes, self._ranking, self._table = processes, ranking, table
        self._rounds = Rounds(processes, _sizes(table), table.base.device, self._use)

    def rank(self, index: int, gradient: Tensor | Factors) -> None:
        """See `Ranking`; raises where some process's gradient is not finite, in all of them."""
        self._rounds.offer(index, as_dense(gradient))

    def rank_zero(self, index: int) -> None:
        """See `Ranking`."""
        self._rounds.offer(index, None)

    def result(self) -> Ranked:
        """See `Ranking`."""
        self._rounds.finish()
        return self._ranking.result()

    def _use(self, arrivals: list[Arrival]) -> None:
        reached = [a for a in arrivals if a.anywhere]
        for arrival in arrivals:
            if not arrival.anywhere:
                self._ranking.rank_zero(arrival.index)
        if not reached:
            return
        shapes = [self._table.layout.tensors[a.index].shape for a in reached]
        flat = torch.cat([self._flat(a) for a in reached])
        parts = self._processes.mean(flat).split([shape.numel() for shape in shapes])
        for arrival, part, shape in zip(reached, parts, shapes, strict=True):
            self._ranking.rank(arrival.index, part.view(shape))

    def _flat(self, arrival: Arrival) -> Tensor:
        """In the dtype of ``values``: sums of bfloat16 would lose bits."""
        base = self._table.base
        if arrival.gradient is None:
            return base.new_zeros(self._table.layout.tensors[arrival.index].numel())
        return as_dense(arrival.gradient).reshape(-1).to(base)


class CandidateRanking:
    """Ranks by the exact mean gradient of what some process's own gradient puts first.

    Args:
        processes: Whose mean it is.
        new: Makes rankers; its heuristic must score an entry by that entry's gradient alone.
        table: What is unmasked already.
    """

    def __init__(self, processes: Processes, new: NewRanker, table: SlotTable) -> None:
        self._processes, self._new, self._table = processes, new, table
        self._own = new(table)
        self._top = StreamingTopK(self._own.top.k, self._own.top.floor)
        self._rounds = Rounds(processes, _sizes(table), table.base.device, self._use)

    def rank(self, index: int, gradient: Tensor | Factors) -> None:
        """See `Ranking`; raises where some process's gradient is not finite, in all of them."""
        self._rounds.offer(index, gradient)

    def rank_zero(self, index: int) -> None:
        """See `Ranking`."""
        self._rounds.offer(index, None)

    def result(self) -> Ranked:
        """See `Ranking`."""
        self._rounds.finish()
        return self._top.result()

    def _use(self, arrivals: list[Arrival]) -> None:
        union = self._union(arrivals)
        if not union.numel():
            return
        gradients = self._processes.mean(self._gradients(arrivals, union))
        weights = self._table.layout.read(union, self._table.base.dtype)
        scores = self._own.heuristic.score(weights, gradients)
        self._top.merge(Ranked(scores, union, gradients))

    def _union(self, arrivals: list[Arrival]) -> Tensor:
        """Positions that any process offers, ascending."""
        device, error = self._table.base.device, None
        try:
            offers = self._offers(arrivals).to(device)
        except NonFiniteGradientError as own:  # the others wait for this process: told first, raised then by all
            error, offers = own, torch.empty(0, dtype=torch.int64, device=device)
        count = torch.tensor([-1 if error else offers.numel()], device=device)
        counts: list[int] = self._processes.gather(count).squeeze(1).tolist()
        if min(counts) < 0:
            raise error or NonFiniteGradientError(
                f"the gradient of process {counts.index(-1)} is not finite; its own error says where"
            )
        return torch.cat(self._processes.gather_ragged(offers, counts)).unique() if max(counts) else offers

    def _offers(self, arrivals: list[Arrival]) -> Tensor:
        """Positions of these tensors' entries that are among this process's first k so far."""
        for arrival in arrivals:
            if arrival.gradient is None:
                self._own.rank_zero(arrival.index)
            else:
                self._own.rank(arrival.index, arrival.gradient)
        positions = self._own.top.result().positions.sort().values
        bounds = self._table.layout.bounds.tolist()
        edges = [bounds[a.index : a.index + 2] for a in arrivals]
        slices = torch.searchsorted(positions, torch.tensor(edges, device=positions.device)).tolist()
        return torch.cat([positions[low:high] for low, high in slices])

    def _gradients(self, arrivals: list[Arrival], union: Tensor) -> Tensor:
        """This process's gradient at positions."""
        values = self._table.base.new_zeros(union.numel())
        own = {a.index: a.gradient for a in arrivals}
        for index, entries in self._table.layout.entries(union):
            gradient = own[index]
            if gradient is not None:
                values[entries.slots] = gradient_at(gradient, entries).to(values)
        return values


def _sizes(table: SlotTable) -> list[int]:
    return [tensor.numel() for tensor in table.layout.tensors]
