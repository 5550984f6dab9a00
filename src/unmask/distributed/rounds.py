"""Tensors' gradients arrive in each process when its backward forms them; together they must be used in one order.

Whenever a process holds `BUCKET` numbers, and once more when its backward is over, it enters a *round*: all processes say which
tensors they hold, and use those that all of them hold. So nobody needs to know beforehand which tensors a loss reaches or in
which order, and a process holds little more than a bucket where all have the same order, as they have in practice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.distributed.processes import Processes
from unmask.gradients.factors import Factors

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
