"""Hooks on every ``torch.optim.Optimizer.step``, so that a training loop needs no further call for a selection."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from unmask.delta.live import LIVE
from unmask.errors import ScheduleNotRunError, SelectionError


class Steppable:
    """The part of a selection that the optimizer's hooks call. A subclass overrides what concerns it.

    Attributes:
        model: The model that was selected from.
        values: The parameter that an optimizer trains.
        stepping: True while a step of the pacing parameter runs that is not final yet.
    """

    model: nn.Module
    values: nn.Parameter
    stepping = False

    @property
    def in_use(self) -> int:
        """The number of slots of ``values`` that the coming step trains."""
        return 0

    def pacing_parameter(self) -> Tensor:
        """Returns the first trained parameter. Each step of an optimizer that holds it advances the schedule by one."""
        return self.values

    def owns(self, parameter: Tensor) -> bool:
        """Returns True if an optimizer that holds this parameter must hold another one, of the selection, in its place."""
        return False

    def check_writes(self) -> None:
        """Refuses writes that may be of a stale copy, when a step of the pacing parameter begins."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Refuses a step of the pacing parameter that would train nothing or something broken; begins any other."""

    def after_step(self, optimizer: Optimizer, held: Sequence[Tensor]) -> None:
        """Makes a step of the pacing parameter final. The optimizer holds the given parameters."""

    def before_other_step(self, held: Sequence[Tensor]) -> None:
        """Refuses an optimizer that was to train the selection, and does not hold the pacing parameter."""

    def after_other_step(self, held: Sequence[Tensor]) -> None:
        """Follows the step of an optimizer that does not hold the pacing parameter."""


def watch(selection: Steppable) -> None:
    """Lets every optimizer's step serve the selection, until `unwatch` is called or the selection is deleted."""
    _register()
    LIVE.add(selection)


def slots_in_use(parameter: Tensor) -> int | None:
    """Returns how many entries the coming step trains, if the parameter is a live selection's ``values``; else None."""
    return next((live.in_use for live in list(LIVE) if live.values is parameter), None)


def unwatch(selection: Steppable) -> None:
    """Stops serving the selection."""
    LIVE.discard(selection)


@functools.cache
def _register() -> None:
    """Registers one pair of hooks for all selections, for good: a hook must not be removed while torch runs the hooks."""
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _paces(held: Sequence[Tensor], selection: Steppable) -> bool:
    pacing = selection.pacing_parameter()
    return any(p is pacing for p in held)


def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    held, closure = _held(optimizer), kwargs.get("closure", args[1] if len(args) > 1 else None)
    for selection in list(LIVE):
        if not _paces(held, selection):
            if any(selection.owns(p) for p in held):
                raise ScheduleNotRunError(
                    "this optimizer holds the model's frozen parameters, so nothing would be trained and no weight unmasked. "
                    "Build it from the selection instead: torch.optim.AdamW(selection.parameters(), lr=...)."
                )
            selection.before_other_step(held)
            continue
        if not selection.stepping:  # otherwise this step runs inside another one, which has written already
            selection.check_writes()
        selection.stepping = False
        found = getattr(optimizer, "found_inf", None)
        if found is not None and found.item() > 0:  # a GradScaler makes a fused optimizer skip this step in its kernel
            continue
        if closure is None:
            selection.before_step(optimizer)
        else:  # the backward runs inside the step
            closure = _checked(closure, selection, optimizer)
        selection.stepping = True
    return (args, kwargs) if closure is None else (args[:1], {**kwargs, "closure": closure})


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = _held(optimizer)
    for selection in list(LIVE):
        if not _paces(held, selection):
            selection.after_other_step(held)
        # Otherwise nothing is to be made final: either GradScaler made a fused optimizer skip this step, or a nested step() (of
        # a subclass that calls super().step()) has done it already.
        elif selection.stepping:
            selection.stepping = False
            selection.after_step(optimizer, held)


def _checked(closure: Callable[[], Any], selection: Steppable, optimizer: Optimizer) -> Callable[[], Any]:
    """Returns a closure that calls the user's, and then does what otherwise is done before the step."""
    calls = 0

    def run() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise SelectionError(
                f"{type(optimizer).__name__} calls its closure more than once per step, at points between two steps that the "
                "model's tensors do not follow. Use an optimizer that evaluates once (LBFGS: max_iter=1)."
            )
        loss = closure()
        selection.before_step(optimizer)
        return loss

    return run
