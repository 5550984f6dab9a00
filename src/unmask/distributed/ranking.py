"""Ranks entries by the mean gradient of several processes: of all entries, or of those that each process offers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.distributed.processes import Processes
from unmask.errors import NonFiniteGradientError
from unmask.gradients.factors import Factors, as_dense, gradient_at
from unmask.ranking.ledger import Ledger
from unmask.ranking.ranker import NewRanker, Ranking
from unmask.ranking.topk import Ranked, StreamingTopK

BUCKET = 1 << 22  # numbers in a bucket: 16 MiB of float32, about as much as in a bucket of DDP

_GRADIENT, _ZERO = 1, 2  # states of a tensor in a process; 0 means that backward has not reached it yet


@dataclass(frozen=True)
class Arrival:
    """A tensor whose gradient is ready in all processes.

    Attributes:
        index: The tensor's index.
        gradient: This process's gradient; None if its loss did not reach the tensor.
        anywhere: True if the loss of some process reached the tensor.
    """

    index: int
    gradient: Tensor | Factors | None
    anywhere: bool


class Rounds:
    """Brings the gradients of one backward into an order that all processes share; each may reach the tensors in another one.

    A round is one exchange: the processes say which gradients they hold, and use those that are ready in all of them. A process
    begins a round when it holds a bucket of numbers, or when its backward has ended.
    """

    def __init__(self, processes: Processes, table: Ledger) -> None:
        self._processes, self._table = processes, table
        self._sizes = [tensor.numel() for tensor in table.layout.tensors]
        self._held: dict[int, Tensor | Factors | None] = {}  # None is a gradient of zero
        self._numbers = 0

    def rank(self, index: int, gradient: Tensor | Factors) -> None:
        """Implements `Ranking.rank`. If the gradient of some process is not finite, all processes raise."""
        self._held[index] = gradient
        self._numbers += self._sizes[index]
        if self._numbers >= BUCKET:
            self._round(done=False)

    def rank_zero(self, index: int) -> None:
        self._held[index] = None

    def finish(self) -> None:
        """Ends this process's offers, and takes part in rounds until all processes have ended theirs."""
        while not self._round(done=True):
            pass

    def _use(self, arrivals: list[Arrival]) -> None:
        """Uses a round's tensors, which are in ascending order and the same in all processes."""
        raise NotImplementedError

    def _round(self, done: bool) -> bool:
        """Makes one round; returns True if it was the last."""
        own = [0] * len(self._sizes) + [int(done)]
        for index, gradient in self._held.items():
            own[index] = _ZERO if gradient is None else _GRADIENT
        # (processes, tensors + 1): the state of each tensor in each process, and whether the process is done
        states = self._processes.gather(torch.tensor(own, dtype=torch.uint8, device=self._table.base.device)).cpu()
        tensors, finished = states[:, :-1], states[:, -1:]
        ready = (tensors > 0).any(0) & ((tensors > 0) | (finished > 0)).all(0)
        anywhere = (tensors == _GRADIENT).any(0).tolist()
        arrivals = []
        for index in ready.nonzero().squeeze(1).tolist():
            gradient = self._held.pop(index, None)
            self._numbers -= 0 if gradient is None else self._sizes[index]
            arrivals.append(Arrival(index, gradient, anywhere[index]))
        if arrivals:
            self._use(arrivals)
        return bool(finished.all())


class ExactRanking(Rounds):
    """Ranks by the dense gradient, averaged over the processes one bucket of tensors at a time, as backward produces them.

    The given ranking receives the averaged gradients, which are the same in all processes. Each process sends the dense
    gradient, as under DDP, and holds one bucket.
    """

    def __init__(self, processes: Processes, ranking: Ranking, table: Ledger) -> None:
        super().__init__(processes, table)
        self._ranking = ranking

    def rank(self, index: int, gradient: Tensor | Factors) -> None:
        super().rank(index, as_dense(gradient))

    def result(self) -> Ranked:
        self.finish()
        return self._ranking.result()

    def _use(self, arrivals: list[Arrival]) -> None:
        reached = [a for a in arrivals if a.anywhere]
        for arrival in arrivals:
            if not arrival.anywhere:
                self._ranking.rank_zero(arrival.index)
        if not reached:
            return
        base, tensors = self._table.base, self._table.layout.tensors
        gradients = [  # in the dtype of ``values``, as sums in bfloat16 would lose bits
            base.new_zeros(tensors[a.index].shape) if a.gradient is None else as_dense(a.gradient).contiguous().to(base)
            for a in reached
        ]
        for arrival, mean in zip(reached, self._processes.means(gradients), strict=True):
            self._ranking.rank(arrival.index, mean)


class CandidateRanking(Rounds):
    """Ranks by the exact mean gradient those entries that some process's own gradient ranks among the first k so far.

    Each process sends O(k) numbers and holds one bucket. An entry that no process offers is not considered. The heuristic of
    the rankers that ``new`` makes must score an entry by that entry's gradient alone.
    """

    def __init__(self, processes: Processes, new: NewRanker, table: Ledger) -> None:
        super().__init__(processes, table)
        self._own = new(table)
        self._top = StreamingTopK(self._own.top.k, self._own.top.floor)

    def result(self) -> Ranked:
        self.finish()
        return self._top.result()

    def _use(self, arrivals: list[Arrival]) -> None:
        layout, base = self._table.layout, self._table.base
        error: NonFiniteGradientError | None = None
        try:
            offers = self._offers(arrivals).to(base.device)
        except NonFiniteGradientError as own:
            error, offers = own, torch.empty(0, dtype=torch.int64, device=base.device)
        union = torch.cat(self._processes.gather_columns([offers], error)[0]).unique()
        if not union.numel():
            return
        held, gradients = {a.index: a.gradient for a in arrivals}, base.new_zeros(union.numel())
        for index, entries in layout.entries(union):
            gradient = held[index]
            if gradient is not None:
                gradients[entries.slots] = gradient_at(gradient, entries).to(gradients)
        gradients = self._processes.mean(gradients)
        scores = self._own.heuristic.score(layout.read(union, base.dtype), gradients)
        self._top.merge(Ranked(scores, union, gradients))

    def _offers(self, arrivals: list[Arrival]) -> Tensor:
        """Returns the positions of those entries of the tensors that are among this process's first k so far."""
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
