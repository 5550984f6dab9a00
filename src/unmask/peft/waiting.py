"""Waiting: what the optimizer hooks meet while an adapter is to be trained and no forward has started its selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from unmask.errors import ScheduleNotRunError


class Waiting:
    """Refuses an optimizer's step that would train nothing; see `unmask.stepping.Steppable`.

    Args:
        values: The adapter's.
        tensors: The base's tensors that it may set.
    """

    def __init__(self, values: nn.Parameter, tensors: Sequence[nn.Parameter]) -> None:
        self.model = nn.Module()  # no model has a live selection for it yet
        self.values = values
        self.step = 0
        self._tensors = tensors

    @property
    def in_use(self) -> int:
        """None of the slots is trained."""
        return 0

    def clock(self) -> Tensor:
        """The parameter whose optimizer step is refused."""
        return self.values

    def owns(self, parameter: Tensor) -> bool:
        """Whether an optimizer that holds this parameter was built from the base."""
        return any(parameter is tensor for tensor in self._tensors)

    def check_model(self) -> None:
        """Nothing was selected from yet."""

    def has_gradient(self) -> bool:
        """True, so that `before_step` gives the reason."""
        return True

    def nonfinite(self) -> None:
        """Nothing to report."""

    @property
    def copies_matter(self) -> bool:
        """Never."""
        return False

    def check_writes(self) -> None:
        """Writes into an adapter that does not train are the adapter's to take in."""

    def check_optimizer(self, optimizer: Any, before: Tensor | None) -> None:
        """Not reached."""

    def before_step(self, optimizer: Any) -> None:
        """An optimizer steps on values that no forward knows of.

        Raises:
            ScheduleNotRunError: Always.
        """
        raise ScheduleNotRunError(
            "optimizer.step() was called, but no forward in grad mode has gone through the PEFT model since the adapter was "
            "added, made active or moved, so nothing would be trained. Call the PEFT model (or its base model) itself, not "
            "a module inside it, and put it in training mode first: model.train()."
        )

    def after_step(self) -> None:
        """Not reached."""

    def trains_beside(self, held: Sequence[Tensor]) -> bool:
        """Never."""
        return False

    def sync_dense(self, held: Sequence[Tensor]) -> None:
        """Nothing is trained whole here: modules_to_save are PEFT's."""
