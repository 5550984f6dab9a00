"""Protocols that let several processes select together: a `Reducer` averages gradients, a `Ranking` orders entries by them."""

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
    """Ranks the entries of many tensors by their gradient; a single process uses `Ranker`."""

    def rank(self, index: int, gradient: Tensor | Factors) -> None:
        """Offers one tensor's entries by its gradient, which is dense, sparse in rows, or `Factors`."""

    def rank_zero(self, index: int) -> None:
        """Offers a tensor that this process's loss did not reach."""

    def result(self) -> Ranked:
        """Returns the best entries, the same in all processes, with the gradient by which all of them train."""


class Reducer(Protocol):
    """Makes one gradient of the gradients of all processes: their mean."""

    @property
    def several(self) -> bool:
        """True if there is more than one process."""

    def begin(self, plan: Plan, fresh: bool) -> None:
        """Hears that a backward starts.

        Args:
            plan: What the coming optimizer step does.
            fresh: True for the first micro-batch of the step.
        """

    def ranking(self, new: NewRanker, table: Ledger) -> Ranking:
        """Returns a ranking by the gradient of all processes.

        Args:
            new: A function that makes a process's own ranker.
            table: The slots: they tell the weights that are unmasked already.
        """

    def mean(self, tensor: Tensor) -> None:
        """Replaces a tensor by its mean over the processes, in place. The mean is bitwise the same in all of them."""
