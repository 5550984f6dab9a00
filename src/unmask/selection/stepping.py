"""Hooks on every ``torch.optim.Optimizer.step``, so that a training loop needs no further call for a selection.

Before a step they refuse a run that would silently train nothing, or that is broken. After it they make the tentative selection
final, advance the schedule and write ``values`` back into the tensors.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from unmask.delta.live import LIVE
from unmask.errors import NonFiniteGradientError, ScheduleNotRunError, SelectionError


class Steppable:
    """The part of a selection that the optimizer's hooks ask and tell.

    A subclass overrides what concerns it; the rest does nothing.

    Attributes:
        model: The model that was selected from.
        values: The parameter that an optimizer trains.
    """

    model: nn.Module
    values: nn.Parameter

    @property
    def step(self) -> int:
        """The number of the coming step."""
        return 0

    @property
    def in_use(self) -> int:
        """The number of slots of ``values`` that the coming step trains."""
        return 0

    @property
    def copies_matter(self) -> bool:
        """True if `check_optimizer` wants to know what ``values`` held before this step."""
        return False

    def pacing_parameter(self) -> Tensor:
        """Returns the first trained parameter. Each step of an optimizer that holds it advances the schedule by one."""
        return self.values

    def owns(self, parameter: Tensor) -> bool:
        """Returns True if an optimizer that holds this parameter must hold another one, of the selection, in its place."""
        return False

    def trains_outside_budget(self, held: Sequence[Tensor]) -> bool:
        """Returns True if these parameters include dense tensors, which are trained next to ``values``."""
        return False

    def has_gradient(self) -> bool:
        """Returns True if a backward has reached the selection since the last step."""
        return True

    def nonfinite(self) -> str | None:
        """Says what is not finite among this step's gradients; None if all are finite."""
        return None

    def check_model(self) -> None:
        """Refuses a model that is no longer what was selected from."""

    def check_writes(self) -> None:
        """Refuses writes that may be of a stale copy; an optimizer that holds ``pacing_parameter()`` begins its step."""

    def check_optimizer(self, optimizer: Optimizer, before: Tensor | None) -> None:
        """Refuses an optimizer that keeps copies it must not keep; it has changed ``pacing_parameter()``."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Hears that the optimizer is about to change ``pacing_parameter()``."""

    def after_step(self) -> None:
        """Hears that the optimizer has changed ``pacing_parameter()``."""

    def sync_dense(self, held: Sequence[Tensor]) -> None:
        """Hears that an optimizer that holds these parameters has stepped."""


# Selections whose optimizer has begun a step that is not final yet.
_stepping: weakref.WeakSet[Any] = weakref.WeakSet()
# What ``values`` held before the running step, for selections with `Steppable.copies_matter`.
_before_first: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
# For each selection, the step and the gradient that waited while an optimizer of its dense tensors alone stepped.
_passed_over: weakref.WeakKeyDictionary[Any, tuple[int, weakref.ref[Tensor]]] = weakref.WeakKeyDictionary()


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


def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    held, closure = _held(optimizer), kwargs.get("closure", args[1] if len(args) > 1 else None)
    for selection in list(LIVE):
        if not any(p is selection.pacing_parameter() for p in held):
            _refuse_other(selection, held)
            continue
        if selection not in _stepping:  # otherwise this step runs inside another one, which has written already
            selection.check_writes()
        _stepping.discard(selection)
        found = getattr(optimizer, "found_inf", None)
        if (
            found is not None and found.item() > 0
        ):  # a GradScaler told a fused optimizer to skip this step in its kernel
            continue
        if closure is None:
            _ready(selection, optimizer)
        else:  # the backward runs inside the step
            closure = _checked(closure, selection, optimizer)
        _stepping.add(selection)
    return (args, kwargs) if closure is None else (args[:1], {**kwargs, "closure": closure})


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = _held(optimizer)
    for selection in list(LIVE):
        pacing = any(p is selection.pacing_parameter() for p in held)
        if pacing and selection not in _stepping:
            # Nothing is to be made final: either GradScaler made a fused optimizer skip this step, or a nested step() (of a
            # subclass that calls super().step()) has done it already.
            continue
        if pacing:
            _stepping.discard(selection)
            selection.check_optimizer(optimizer, _before_first.pop(selection, None))
        selection.sync_dense(held)
        if pacing:
            selection.after_step()
        elif selection.trains_outside_budget(held) and selection.values.grad is not None:
            _passed_over[selection] = (selection.step, weakref.ref(selection.values.grad))


def _ready(selection: Steppable, optimizer: Optimizer) -> None:
    """Refuses a step that would train nothing or something broken; begins any other."""
    selection.check_model()
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
    taken = optimizer.state.get(selection.pacing_parameter(), {}).get("step")
    if taken is not None and int(taken) > selection.step:
        raise ScheduleNotRunError(
            f"the optimizer's state has taken {int(taken)} steps of the selected weights, the selection {selection.step}: a "
            "checkpoint was loaded in part. Load the selection's state of the same checkpoint too "
            "(selection.load_state_dict; in a Trainer: SelectiveCallback), or start with a new optimizer."
        )
    selection.before_step(optimizer)
    if selection.copies_matter:
        _before_first[selection] = selection.values.detach().clone()


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
        _ready(selection, optimizer)
        return loss

    return run


def _refuse_other(selection: Steppable, held: list[Tensor]) -> None:
    """Refuses an optimizer that a library built of frozen parameters, of none, or of dense tensors alone."""
    if any(selection.owns(p) for p in held):
        raise ScheduleNotRunError(
            "this optimizer holds the model's frozen parameters, so nothing would be trained and no weight unmasked. "
            "Build it from the selection instead: torch.optim.AdamW(selection.parameters(), lr=...)."
        )
    waiting = selection.values.grad
    if waiting is None or not selection.has_gradient():
        return
    step, gradient = _passed_over.get(selection, (-1, None))
    again = (
        selection.trains_outside_budget(held)
        and step == selection.step
        and gradient is not None
        and gradient() is waiting
    )
    if again or not held:
        raise ScheduleNotRunError(
            f"this optimizer holds {'the dense tensors alone' if held else 'no parameter'}, and the gradient of the selected "
            "weights was used by none, so no weight is unmasked. Build it from the selection: "
            "torch.optim.AdamW(selection.parameters(), lr=...), and hand it over: Trainer(..., optimizers=(optimizer, None))."
        )


def clear_state(states: Mapping[str, Any], values: Tensor, slots: Tensor) -> None:
    """Gives slots of ``values`` fresh optimizer state: zeros, in the code in which an 8-bit optimizer writes them.

    Raises:
        SelectionError: A state is quantized, and its code for 0 is not known.
    """
    for name, state in states.items():
        if not isinstance(state, Tensor) or state.shape != values.shape:
            continue
        if state.is_floating_point():
            state[slots] = 0
            continue
        codes = states.get(name.replace("state", "qmap"))  # bitsandbytes writes state1 in codes of qmap1, and so on
        zeros = (codes == 0).nonzero().flatten().tolist() if isinstance(codes, Tensor) else []
        if not name.startswith("state") or not zeros:
            raise SelectionError(
                "repeat-S gives a weight that enters the selection fresh optimizer state, but this optimizer's "
                f"{name!r} is quantized in a code that is not known here; use one with float32 state, or a method that does "
                "not exchange weights (id3, or repeat_d3 with leaving='kept')."
            )
        state[slots] = zeros[0]
