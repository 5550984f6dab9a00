"""The optimizer's side: hooks on every ``torch.optim.Optimizer.step``, so that no further call is needed.

Before a step: refuse what would be a silently static or a broken run. After it: commit the tentative selection, advance
the schedule and write ``values`` back into the tensors.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from unmask.errors import NonFiniteGradientError, ScheduleNotRunError


class Steppable(Protocol):
    """What the hooks need of a selection."""

    def clock(self) -> Tensor:
        """The parameter whose optimizer step is the schedule's step."""

    def owns(self, parameter: Tensor) -> bool:
        """Whether an optimizer that holds this parameter must be told about the selection's own."""

    def before_step(self, optimizer: Optimizer) -> None:
        """The optimizer is about to change ``clock()``."""

    def after_step(self) -> None:
        """The optimizer changed ``clock()``."""

    def sync_dense(self) -> None:
        """Some optimizer stepped on dense tensors."""

    def has_gradient(self) -> bool:
        """Whether a backward has reached the selection since the last step."""

    def nonfinite(self) -> str | None:
        """What is not finite among this step's gradients, if anything."""


class StepHooks:
    """Hooks of one selection on all optimizers; holds the selection weakly."""

    def __init__(self, selection: Steppable) -> None:
        self._selection = weakref.ref(selection)
        self._skipped = False
        self._handles: list[RemovableHandle] = [
            register_optimizer_step_pre_hook(self._pre),
            register_optimizer_step_post_hook(self._post),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        selection = self._selection()
        if selection is None:
            self.remove()
            return
        held = [p for group in optimizer.param_groups for p in group["params"]]
        clock = selection.clock()
        if not any(p is clock for p in held):
            _refuse_foreign(selection, held)
            return
        self._skipped = _overflowed(optimizer)
        has_closure = (
            (len(args) > 1 and callable(args[1])) or (args and callable(args[0])) or callable(kwargs.get("closure"))
        )
        if self._skipped or has_closure:
            return
        _check_gradient(selection)
        selection.before_step(optimizer)

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        selection = self._selection()
        if selection is None or self._skipped:
            self._skipped = False
            return
        clock = selection.clock()
        if any(p is clock for group in optimizer.param_groups for p in group["params"]):
            selection.after_step()
        else:
            selection.sync_dense()


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a GradScaler told a fused optimizer to skip this step inside its kernel."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item() > 0)


def _refuse_foreign(selection: Steppable, held: list[Tensor]) -> None:
    if any(selection.owns(p) for p in held):
        raise ScheduleNotRunError(
            "this optimizer holds the model's frozen parameters, so nothing would be trained and no weight unmasked. "
            "Build it from the selection instead: torch.optim.AdamW(selection.parameters(), lr=...)."
        )


def _check_gradient(selection: Steppable) -> None:
    if not selection.has_gradient():
        raise ScheduleNotRunError(
            "optimizer.step() was called, but no gradient has reached the selection since the last step, so the schedule "
            "cannot run. The order is: loss.backward(), optimizer.step(), optimizer.zero_grad(); the forward must run after "
            "unmask.select(), in grad mode, through the model that was selected from (not a copy of it)."
        )
    reason = selection.nonfinite()
    if reason is not None:
        raise NonFiniteGradientError(
            f"{reason}. Nothing was changed by this step: lower the learning rate, clip the gradient, or look at this batch's loss."
        )
