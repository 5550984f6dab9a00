"""The optimizer's side of a selection: plans each optimizer step, and makes it final."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.errors import NonFiniteGradientError, ScheduleNotRunError, SelectionError, UnmaskWarning
from unmask.ranking.plan import Plan
from unmask.selection.parts import Parts
from unmask.selection.stepping import Steppable


class Steps(Steppable):
    """Plans each optimizer step and makes it final; the optimizer's hooks call it (`unmask.selection.stepping`)."""

    def __init__(self, parts: Parts, check: Callable[[], None], owns: Callable[[Tensor], bool]) -> None:
        self.model, self.values = parts.facts.model, parts.ledger.values
        self._method, self._ledger, self._dense = parts.method, parts.ledger, parts.dense
        self._window, self._taps, self._outside, self._reducer = parts.window, parts.taps, parts.outside, parts.reducer
        self._check, self._owns = check, owns
        self._said_missing = False
        # What ``values`` held before the first step, of a method that picks by gradient.
        self._before: Tensor | None = None
        # The step and the gradient that waited while an optimizer of dense tensors alone stepped.
        self._passed_over: tuple[int, weakref.ref[Tensor]] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Returns what an optimizer trains: ``values`` if it has slots, then the dense tensors or their masters."""
        return ([self.values] if self._ledger.budget else []) + [d.master for d in self._dense]

    def begin(self) -> None:
        """Plans the coming step."""
        self._plan()
        self._taps.prepare()

    def _plan(self) -> None:
        """Starts the window of the coming step with its plan."""
        self._taps.forget()
        method, ledger, window = self._method, self._ledger, self._window
        t, used = ledger.step, ledger.used
        due = method.cumulative(t, ledger.budget)
        if ledger.ordered:
            ledger.unmask(due)
            if method.strategy == "static":  # all weights are known before the first step
                ledger.used = used = due
            window.start(Plan(t, used, due, 0, repeat=False))
        elif method.strategy == "repeat":
            # it also selects again as long as no step has had a gradient to select by
            again = t % method.schedule.stride == 0 or not used
            active = 0 if again and ledger.picked is not None else used
            window.start(Plan(t, used, active, ledger.budget if again else 0, repeat=True, picked=ledger.picked))
        else:
            window.start(Plan(t, used, used, due - used, repeat=False))

    # The methods of `Steppable`, which says what they mean.

    @property
    def in_use(self) -> int:
        return self._window.due

    def pacing_parameter(self) -> Tensor:
        return self.values if self._ledger.budget else self._dense[0].master

    def owns(self, parameter: Tensor) -> bool:
        return self._owns(parameter)

    def check_writes(self) -> None:
        self._outside.refuse_stale()

    def before_step(self, optimizer: Optimizer) -> None:
        self._check()
        if not self._has_gradient():
            raise ScheduleNotRunError(
                "optimizer.step() was called, but no gradient has reached the selection since the last step, so the schedule "
                "cannot run. The order is: loss.backward(), optimizer.step(), optimizer.zero_grad(); the forward must run after "
                "unmask.select(), in grad mode, through the model that was selected from (not a copy of it)."
            )
        if reason := self._nonfinite():
            raise NonFiniteGradientError(
                f"{reason}. This step changed nothing: lower the learning rate, clip the gradient, or look at this batch's loss."
            )
        taken = optimizer.state.get(self.pacing_parameter(), {}).get("step")
        if taken is not None and int(taken) > self._ledger.step:
            raise ScheduleNotRunError(
                f"the optimizer's state has taken {int(taken)} steps of the selected weights, the selection {self._ledger.step}: "
                "a checkpoint was loaded in part. Load the selection's state of the same checkpoint too "
                "(selection.load_state_dict; in a Trainer: SelectiveCallback), or start with a new optimizer."
            )
        self._reducer.stepping(optimizer)
        tentative = self._ledger.tentative
        if self._window.plan.exchanging and tentative is not None:
            _clear_state(optimizer.state.get(self.values, {}), self.values, tentative.slots)
        first = self._ledger.step == 0 and not self._outside.known
        self._before = self.values.detach().clone() if first else None

    def after_step(self, optimizer: Optimizer, held: Sequence[Tensor]) -> None:
        before, self._before = self._before, None
        self._outside.refuse_copies(optimizer, before, self._window.due)
        self._sync_dense(held)
        plan, tentative = self._window.plan, self._ledger.tentative
        if tentative is None and plan.selecting:
            raise ScheduleNotRunError(
                "the optimizer stepped without calling its closure, so no backward selected any weight."
            )
        self._ledger.commit(self._window.due)
        self.values.grad = None  # spent; a Trainer's model.zero_grad() would not reach it
        self.begin()
        if tentative is not None and tentative.missing and not self._said_missing:
            self._said_missing = True
            if plan.picked is not None and tentative.missing < plan.newcomers:
                then = "No other weight has a gradient until the next selecting step"
            elif plan.repeat and plan.used:
                then = "The other picks stay what they were"
            else:
                then = "What is due is unmasked at the next step that has a gradient for it"
            warnings.warn(
                f"step {plan.step} was to select {plan.newcomers:,} weights and selected "
                f"{plan.newcomers - tentative.missing:,}: the {self._method.heuristic.name} score of all others is zero, since "
                "their gradient is, which does not tell one from another (all labels of the batch are -100, say, or the loss "
                f"does not reach the eligible tensors). {then}; this is said once.",
                UnmaskWarning,
                stacklevel=1,
            )

    def before_other_step(self, held: Sequence[Tensor]) -> None:
        waiting, passed_over = self.values.grad, self._passed_over
        if waiting is None or not self._has_gradient():
            return
        again = passed_over is not None and passed_over[0] == self._ledger.step and passed_over[1]() is waiting
        if not held or (again and self._holds_dense(held)):
            raise ScheduleNotRunError(
                f"this optimizer holds {'the dense tensors alone' if held else 'no parameter'}, and the gradient of the selected "
                "weights was used by none, so no weight is unmasked. Build it from the selection: "
                "torch.optim.AdamW(selection.parameters(), lr=...), and hand it over: Trainer(..., optimizers=(optimizer, None))."
            )

    def after_other_step(self, held: Sequence[Tensor]) -> None:
        self._sync_dense(held)
        if self._holds_dense(held) and self.values.grad is not None:
            self._passed_over = (self._ledger.step, weakref.ref(self.values.grad))

    def _has_gradient(self) -> bool:
        """Returns True if a backward has reached the selection since the last step."""
        window = self._window
        if window.plan.selecting and self._ledger.tentative is None and window.nonfinite is None:
            return False
        return any(p.grad is not None for p in ([self.values] if self._ledger.budget else self.parameters()))

    def _nonfinite(self) -> str | None:
        """Returns words for what is not finite among this step's gradients; None if all are finite."""
        if self._window.nonfinite:
            return self._window.nonfinite
        if self.values.grad is not None and not torch.isfinite(self.values.grad).all():
            return "the gradient of the selected weights is not finite"
        for tensor in self._dense:  # one cheap pass: a sum of finite float32 gradients does not overflow in practice
            if tensor.master.grad is not None and not torch.isfinite(tensor.master.grad.sum()):
                return f"the gradient of {tensor.name!r} is not finite"
        return None

    def _holds_dense(self, held: Sequence[Tensor]) -> bool:
        """Returns True if these parameters include dense tensors, which are trained next to ``values``."""
        return bool(self._ledger.budget) and any(d.master is p for d in self._dense for p in held)

    def _sync_dense(self, held: Sequence[Tensor]) -> None:
        """Rounds those dense tensors' masters into the model that an optimizer holds."""
        for tensor in self._dense:
            if any(tensor.master is p for p in held):
                tensor.sync()


def _clear_state(states: Mapping[str, Any], values: Tensor, slots: Tensor) -> None:
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
