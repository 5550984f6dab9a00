"""The optimizer's side of a selection: plans each optimizer step, and makes it final."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.errors import ScheduleNotRunError, UnmaskWarning
from unmask.methods.method import Method
from unmask.ranking.plan import Plan
from unmask.selection.parts import Parts
from unmask.selection.stepping import Steppable, clear_state


class Steps(Steppable):
    """Plans each optimizer step and makes it final; the optimizer's hooks call it (`unmask.selection.stepping`)."""

    def __init__(self, method: Method, parts: Parts, check: Callable[[], None], owns: Callable[[Tensor], bool]) -> None:
        self.model, self.values = parts.facts.model, parts.ledger.values
        self._method, self._ledger, self._dense = method, parts.ledger, parts.dense
        self._window, self._taps, self._outside, self._reducer = parts.window, parts.taps, parts.outside, parts.reducer
        self._check, self._owns = check, owns
        self._said_missing = False

    def parameters(self) -> list[nn.Parameter]:
        """Returns what an optimizer trains: ``values`` if it has slots, then the dense tensors or their masters."""
        return ([self.values] if self._ledger.budget else []) + [d.master for d in self._dense]

    def begin(self) -> None:
        """Plans the coming step."""
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
    def step(self) -> int:
        return self._ledger.step

    @property
    def in_use(self) -> int:
        return self._window.due

    @property
    def copies_matter(self) -> bool:
        """True before the first step of a method that picks by gradient."""
        return self.step == 0 and not self._outside.known

    def pacing_parameter(self) -> Tensor:
        return self.parameters()[0]

    def owns(self, parameter: Tensor) -> bool:
        return self._owns(parameter)

    def trains_outside_budget(self, held: Sequence[Tensor]) -> bool:
        return bool(self._ledger.budget) and any(d.master is p for d in self._dense for p in held)

    def has_gradient(self) -> bool:
        window = self._window
        if window.plan.selecting and self._ledger.tentative is None and window.nonfinite is None:
            return False
        return any(p.grad is not None for p in ([self.values] if self._ledger.budget else self.parameters()))

    def nonfinite(self) -> str | None:
        if self._window.nonfinite:
            return self._window.nonfinite
        if self.values.grad is not None and not torch.isfinite(self.values.grad).all():
            return "the gradient of the selected weights is not finite"
        for tensor in self._dense:  # one cheap pass: a sum of finite float32 gradients does not overflow in practice
            if tensor.master.grad is not None and not torch.isfinite(tensor.master.grad.sum()):
                return f"the gradient of {tensor.name!r} is not finite"
        return None

    def check_model(self) -> None:
        self._check()

    def check_writes(self) -> None:
        self._outside.refuse_stale()

    def check_optimizer(self, optimizer: Optimizer, before: Tensor | None) -> None:
        self._outside.refuse_copies(optimizer, before, self._window.due)

    def before_step(self, optimizer: Optimizer) -> None:
        """Gives a slot that gets another weight fresh optimizer state."""
        self._reducer.stepping(optimizer)
        tentative = self._ledger.tentative
        if self._window.plan.exchanging and tentative is not None:
            clear_state(optimizer.state.get(self.values, {}), self.values, tentative.slots)

    def after_step(self) -> None:
        """Makes the step final in the ledger, and plans the next one."""
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

    def sync_dense(self, held: Sequence[Tensor]) -> None:
        """Rounds those dense tensors' masters into the model that an optimizer holds."""
        for tensor in self._dense:
            if any(tensor.master is p for p in held):
                tensor.sync()
