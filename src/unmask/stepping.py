"""The optimizer's side: hooks on every ``torch.optim.Optimizer.step``, so that no further call is needed.

Before a step: refuse what would be a silently static or a broken run. After it: commit the tentative selection, advance
the schedule and write ``values`` back into the tensors.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from unmask.errors import NonFiniteGradientError, ScheduleNotRunError, SelectionError
from unmask.gradients.tap import is_tapped
from unmask.quantised.layers import is_trained


class Steppable(Protocol):
    """What the hooks need of a selection."""

    model: nn.Module
    values: nn.Parameter

    @property
    def in_use(self) -> int:
        """How many slots of ``values`` the coming step trains."""

    def clock(self) -> Tensor:
        """The parameter whose optimizer step is the schedule's step."""

    def owns(self, parameter: Tensor) -> bool:
        """Whether an optimizer that holds this parameter must be told about the selection's own."""

    def before_step(self, optimizer: Optimizer) -> None:
        """The optimizer is about to change ``clock()``."""

    def after_step(self) -> None:
        """The optimizer changed ``clock()``."""

    def sync_dense(self, held: Sequence[Tensor]) -> None:
        """An optimizer that holds these parameters stepped."""

    def has_gradient(self) -> bool:
        """Whether a backward has reached the selection since the last step."""

    def nonfinite(self) -> str | None:
        """What is not finite among this step's gradients, if anything."""


_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()
_skipped: set[int] = set()  # ids of optimizers whose running step is skipped inside a fused kernel


def watch(selection: Steppable) -> None:
    """Lets every optimizer's step serve the selection, until `unwatch` or the selection's end."""
    _register()
    _LIVE.add(selection)


def has_selection(model: nn.Module) -> bool:
    """Whether a live selection was made from this model, or holds tensors of it."""
    if any(is_tapped(p) for p in model.parameters()) or is_trained(model):
        return True
    return any(live.model is model for live in list(_LIVE))


def slots_in_use(parameter: Tensor) -> int | None:
    """How many entries the coming step trains, if the parameter is a live selection's ``values``; else None."""
    return next((live.in_use for live in list(_LIVE) if live.values is parameter), None)


def unwatch(selection: Steppable) -> None:
    """Stops serving the selection."""
    _LIVE.discard(selection)


@functools.cache
def _register() -> None:
    """One pair of hooks for all selections, for good: a hook must not be removed while torch runs the hooks."""
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _contains(held: list[Tensor], clock: Tensor) -> bool:
    return any(p is clock for p in held)


def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    _skipped.discard(id(optimizer))
    held, closure = _held(optimizer), kwargs.get("closure", args[1] if len(args) > 1 else None)
    for selection in list(_LIVE):
        if not _contains(held, selection.clock()):
            _refuse_foreign(selection, held)
        elif _overflowed(optimizer):
            _skipped.add(id(optimizer))
        elif closure is None:
            _ready(selection, optimizer)
        else:  # the backward runs inside the step
            closure = _checked(closure, selection, optimizer)
    return (args, kwargs) if closure is None else (args[:1], {**kwargs, "closure": closure})


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if id(optimizer) in _skipped:
        _skipped.discard(id(optimizer))
        return
    held = _held(optimizer)
    for selection in list(_LIVE):
        selection.sync_dense(held)
        if _contains(held, selection.clock()):
            selection.after_step()


def _ready(selection: Steppable, optimizer: Optimizer) -> None:
    _check_gradient(selection)
    selection.before_step(optimizer)


def _checked(closure: Callable[[], Any], selection: Steppable, optimizer: Optimizer) -> Callable[[], Any]:
    """The user's closure, and then what otherwise runs before the step."""
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
        _ready(selection, optimizer)
        return loss

    return run


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
            f"{reason}. This step changed nothing: lower the learning rate, clip the gradient, or look at this batch's loss."
        )
