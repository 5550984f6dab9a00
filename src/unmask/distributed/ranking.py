"""One ranking by the mean gradient of several processes, with or without sending the whole of it.

- `ExactRanking`: tensors' gradients are reduced, a bucket at a time, as they arrive; every process ranks the same numbers. Wire:
  the dense gradient, as under DDP. Memory: a bucket.
- `CandidateRanking`: of each bucket every process offers what is among the first k of its own gradient so far; the mean gradient
  of what anybody offered is formed while the bucket is still there, and ranked. Wire: O(k) per process. Memory: a bucket. What
  is ranked has its exact score; an entry that is not among the first k of any process is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.distributed.processes import Processes
from unmask.errors import NonFiniteGradientError
from unmask.gradients.factors import Factors, as_dense, gradient_at
from unmask.ranking.exchange import NewRanker, Ranking
from unmask.ranking.ledger import Ledger
from unmask.ranking.topk import Ranked, StreamingTopK


class ExactRanking:
    """Ranks by the reduced dense gradient.

    Args:
        processes: Whose mean it is.
        ranking: What ranks the reduced gradients, the same in all processes.
        table: The tensors.
    """

    def __init__(self, processes: Processes, ranking: Ranking, table: Ledger) -> None:
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

    def __init__(self, processes: Processes, new: NewRanker, table: Ledger) -> None:
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


def _sizes(table: Ledger) -> list[int]:
    return [tensor.numel() for tensor in table.layout.tensors]


BUCKET = 1 << 22  # numbers: 16 MiB of float32, of the order of a bucket of DDP's

_GRADIENT, _ZERO = 1, 2  # how a process holds a tensor


@dataclass(frozen=True)
class Arrival:
    """One tensor's turn, in all processes at once.

    Attributes:
        index: The tensor.
        gradient: This process's gradient; None where its loss did not reach the tensor.
        anywhere: Whether some process's loss reached it.
    """

    index: int
    gradient: Tensor | Factors | None
    anywhere: bool


class Rounds:
    """Brings the gradients of one backward into an order that all processes share.

    Args:
        processes: Who takes part.
        sizes: Of every tensor: how many numbers its gradient counts for.
        device: Where tensors must be for the process group.
        use: Called with each round's tensors, ascending; the same tensors in all processes.
    """

    def __init__(
        self, processes: Processes, sizes: list[int], device: torch.device, use: Callable[[list[Arrival]], None]
    ) -> None:
        self._processes, self._sizes, self._device, self._use = processes, sizes, device, use
        self._held: dict[int, Tensor | Factors | None] = {}
        self._numbers = 0

    def offer(self, index: int, gradient: Tensor | Factors | None) -> None:
        """A tensor's gradient is there; None: it is zero in this process."""
        self._held[index] = gradient
        if gradient is not None:
            self._numbers += self._sizes[index]
            if self._numbers >= BUCKET:
                self._round(done=False)

    def finish(self) -> None:
        """This process has offered everything: takes part until all have."""
        while not self._round(done=True):
            pass

    def _round(self, done: bool) -> bool:
        """One round; says whether it was the last."""
        states = self._states(done)
        tensors, finished = states[:, :-1], states[:, -1:]
        ready = (tensors > 0).any(0) & ((tensors > 0) | (finished > 0)).all(0)
        anywhere = (tensors == _GRADIENT).any(0).tolist()
        arrivals = [Arrival(i, self._take(i), anywhere[i]) for i in ready.nonzero().squeeze(1).tolist()]
        if arrivals:
            self._use(arrivals)
        return bool(finished.all())

    def _states(self, done: bool) -> Tensor:
        """How each process holds each tensor, and whether it is done: (processes, tensors + 1), on the CPU."""
        own = [0] * len(self._sizes) + [int(done)]
        for index, gradient in self._held.items():
            own[index] = _ZERO if gradient is None else _GRADIENT
        return self._processes.gather(torch.tensor(own, dtype=torch.uint8, device=self._device)).cpu()

    def _take(self, index: int) -> Tensor | Factors | None:
        gradient = self._held.pop(index, None)
        if gradient is not None:
            self._numbers -= self._sizes[index]
        return gradient
