"""The optimizer's side: hooks on every ``torch.optim.Optimizer.step``, so that no further call is needed.

Before a step: refuse what would be a silently static or a broken run. After it: commit the tentative selection, advance
the schedule and write ``values`` back into the tensors.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from unmask.delta.live import _LIVE
from unmask.errors import NonFiniteGradientError, ScheduleNotRunError, SelectionError


class Steppable(Protocol):
    """What the hooks need of a selection."""

    model: nn.Module
    values: nn.Parameter
    step: int

    @property
    def in_use(self) -> int:
        """How many slots of ``values`` the coming step trains."""

    def clock(self) -> Tensor:
        """The parameter whose optimizer step is the schedule's step."""

    def owns(self, parameter: Tensor) -> bool:
        """Whether an optimizer that holds this parameter must be told about the selection's own."""

    @property
    def copies_matter(self) -> bool:
        """Whether `check_optimizer` wants to know what ``values`` held before this step."""

    def check_writes(self) -> None:
        """An optimizer that holds ``clock()`` begins its step: refuses writes that may be of a stale copy."""

    def check_optimizer(self, optimizer: Optimizer, before: Tensor | None) -> None:
        """The optimizer has changed ``clock()``: refuses one that keeps copies it must not keep."""

    def check_model(self) -> None:
        """Refuses a model that is no longer what was selected from."""

    def before_step(self, optimizer: Optimizer) -> None:
        """The optimizer is about to change ``clock()``."""

    def after_step(self) -> None:
        """The optimizer changed ``clock()``."""

    def sync_dense(self, held: Sequence[Tensor]) -> None:
        """An optimizer that holds these parameters stepped."""

    def trains_beside(self, held: Sequence[Tensor]) -> bool:
        """Whether these parameters include dense tensors, trained beside ``values``."""

    def has_gradient(self) -> bool:
        """Whether a backward has reached the selection since the last step."""

    def nonfinite(self) -> str | None:
        """What is not finite among this step's gradients, if anything."""


_stepping: weakref.WeakSet[Any] = weakref.WeakSet()  # selections whose optimizer's running step is not committed yet
_before_first: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()  # `values`, where `copies_matter`
# Per selection: the step and the gradient that waited while an optimizer of its dense tensors alone stepped.
_passed_over: weakref.WeakKeyDictionary[Any, tuple[int, weakref.ref[Tensor]]] = weakref.WeakKeyDictionary()


def watch(selection: Steppable) -> None:
    """Lets every optimizer's step serve the selection, until `unwatch` or the selection's end."""
    _register()
    _LIVE.add(selection)


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
    held, closure = _held(optimizer), kwargs.get("closure", args[1] if len(args) > 1 else None)
    for selection in list(_LIVE):
        if not _contains(held, selection.clock()):
            _refuse_foreign(selection, held)
            _refuse_bypass(selection, held)
            continue
        if selection not in _stepping:  # else this step runs inside another one, which has written already
            selection.check_writes()
        _stepping.discard(selection)
        if _overflowed(optimizer):
            continue
        if closure is None:
            _ready(selection, optimizer)
        else:  # the backward runs inside the step
            closure = _checked(closure, selection, optimizer)
        _stepping.add(selection)
    return (args, kwargs) if closure is None else (args[:1], {**kwargs, "closure": closure})


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = _held(optimizer)
    for selection in list(_LIVE):
        clocked = _contains(held, selection.clock())
        if clocked and selection not in _stepping:
            continue  # skipped in a fused kernel; or a step inside this one (a subclass that calls its super's) was it
        if clocked:
            _stepping.discard(selection)
            selection.check_optimizer(optimizer, _before_first.pop(selection, None))
        selection.sync_dense(held)
        if clocked:
            selection.after_step()
        elif selection.trains_beside(held) and selection.values.grad is not None:
            _passed_over[selection] = (selection.step, weakref.ref(selection.values.grad))


def _ready(selection: Steppable, optimizer: Optimizer) -> None:
    selection.check_model()
    _check_gradient(selection)
    _check_steps_taken(selection, optimizer)
    selection.before_step(optimizer)
    if selection.copies_matter:
        _before_first[selection] = selection.values.detach().clone()


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


def _refuse_bypass(selection: Steppable, held: list[Tensor]) -> None:
    """An optimizer that a library built from what requires grad: nothing, or the dense tensors alone."""
    waiting = selection.values.grad
    if waiting is None or not selection.has_gradient():
        return
    step, gradient = _passed_over.get(selection, (-1, None))
    again = selection.trains_beside(held) and step == selection.step and gradient is not None and gradient() is waiting
    if again or not held:
        raise ScheduleNotRunError(
            f"this optimizer holds {'the dense tensors alone' if held else 'no parameter'}, and the gradient of the selected "
            "weights was used by none, so no weight is unmasked. Build it from the selection: "
            "torch.optim.AdamW(selection.parameters(), lr=...), and hand it over: Trainer(..., optimizers=(optimizer, None))."
        )


def _check_steps_taken(selection: Steppable, optimizer: Optimizer) -> None:
    """Optimizer state that was loaded without the selection's."""
    taken = optimizer.state.get(selection.clock(), {}).get("step")
    if taken is not None and int(taken) > selection.step:
        raise ScheduleNotRunError(
            f"the optimizer's state has taken {int(taken)} steps of the selected weights, the selection {selection.step}: a "
            "checkpoint was loaded in part. Load the selection's state of the same checkpoint too "
            "(selection.load_state_dict; in a Trainer: SelectiveCallback), or start with a new optimizer."
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


def clear_state(states: Mapping[str, Any], values: Tensor, slots: Tensor) -> None:
    """Gives slots of ``values`` fresh optimizer state: zeros, in whatever code an 8-bit optimizer writes them.

    Raises:
        SelectionError: A quantized state whose code for 0 is not known.
    """
    for name, state in states.items():
        if isinstance(state, Tensor) and state.shape == values.shape:
            state[slots] = 0 if state.is_floating_point() else _code_of_zero(name, states)


def _code_of_zero(name: str, states: Mapping[str, Any]) -> int:
    """bitsandbytes writes ``state1`` in codes of ``qmap1``, and so on."""
    codes = states.get(name.replace("state", "qmap"))
    zeros = [] if not isinstance(codes, Tensor) else (codes == 0).nonzero().flatten().tolist()
    if name.startswith("state") and zeros:
        return int(zeros[0])
    raise SelectionError(
        f"repeat-S gives a weight that enters the selection fresh optimizer state, but this optimizer's {name!r} is quantized "
        "in a code that is not known here; use one with float32 state, or a method that does not exchange weights (id3, or "
        "repeat_d3 with leaving='kept')."
    )
