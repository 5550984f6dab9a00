"""The seam for several processes: what happens to a process's gradients before anything is decided by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from unmask.gradients.factors import Factors
from unmask.ranking.ledger import Ledger
from unmask.ranking.plan import Plan
from unmask.ranking.ranker import Ranker
from unmask.ranking.topk import Ranked

NewRanker = Callable[[Ledger], Ranker]


class Ranking(Protocol):
    """Ranks the entries of many tensors by their gradient; `Ranker` is the one of a single process."""

    def rank(self, index: int, gradient: Tensor | Factors) -> None:
        """Offers one tensor's entries, by its gradient: dense, sparse in rows, or `Factors`."""

    def rank_zero(self, index: int) -> None:
        """Offers a tensor that this process's loss did not reach."""

    def result(self) -> Ranked:
        """The best entries, the same in all processes, with the gradient that all of them train by."""


class Reducer(Protocol):
    """Makes one gradient of the gradients of all processes."""

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""

    def begin(self, plan: Plan, fresh: bool) -> None:
        """A backward starts: the first of a step's, if ``fresh``, or one more micro-batch."""

    def ranking(self, new: NewRanker, table: Ledger) -> Ranking:
        """A ranking by the gradient of all processes.

        Args:
            new: Makes a process's own ranker.
            table: What is unmasked already.
        """

    def mean(self, tensor: Tensor) -> None:
        """Replaces a tensor by its mean over the processes, in place; bitwise the same in all of them."""


class OneProcess:
    """The reducer of a process that trains alone: its gradient is the gradient."""

    several = False

    def begin(self, plan: Plan, fresh: bool) -> None:
        """Nothing to do."""

    def ranking(self, new: NewRanker, table: Ledger) -> Ranking:
        """The process's own ranker."""
        return new(table)

    def mean(self, tensor: Tensor) -> None:
        """Leaves the tensor as it is."""
