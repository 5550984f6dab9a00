"""Selection: a budget of scalar weights as one trainable vector."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.calibration.estimates import estimates
from unmask.delta.added import refuse_dead_lora
from unmask.delta.delta import SparseDelta
from unmask.delta.record import record_delta
from unmask.distributed.facts import facts_of_method
from unmask.distributed.reducer import ProcessReducer
from unmask.distributed.sharding import catch_up_before_gather, reshard
from unmask.errors import MethodError, ScheduleNotRunError, SelectionError, UnmaskWarning
from unmask.gradients.entries import take
from unmask.gradients.linear import handlers
from unmask.gradients.tapped import owner_of
from unmask.gradients.taps import TapSet
from unmask.gradients.unreached import unwatch_forwards, watch_forwards
from unmask.gradients.wrappers import named_parameters, persistent_buffers
from unmask.gradients.writes import copy_in, copying_optimizer, same, stale_write
from unmask.methods.method import Accumulation, ClipScope, Gradients, Method
from unmask.quantised.layers import reach_biases, settle, stored_in, weights
from unmask.ranking.ledger import SlotTable
from unmask.ranking.plan import Plan
from unmask.ranking.ranker import Ranker
from unmask.selection.dense import DenseGradients, DenseTensor, catch_up_before_forward
from unmask.selection.identity import Identity
from unmask.selection.state import restore, state_of
from unmask.selection.stepping import clear_state, unwatch, watch
from unmask.selection.storage import Ties
from unmask.selection.window import Window

if TYPE_CHECKING:
    pass


def _emptied(values: nn.Parameter, zeros: Tensor) -> nn.Parameter:
    """A given parameter as the ``values`` of a selection that starts."""
    for what in ("shape", "dtype", "device"):
        given, needed = getattr(values, what), getattr(zeros, what)
        if given != needed:
            raise MethodError(f"values has {what} {given}; this selection needs {needed}.")
    with torch.no_grad():
        values.copy_(zeros)
    values.grad = None
    return values


def known_positions(method: Method, table: SlotTable, slots: int, scores: dict[int, Tensor] | None = None) -> Tensor:
    """The positions (slots,) int64 that a method without gradients unmasks, in order.

    Args:
        method: The method.
        table: Of the eligible tensors.
        slots: B.
        scores: By tensor index, where a calibration made them; they are used up.
    """
    ranker = Ranker(method.heuristic, table, method.allocation, slots, 0, False)
    for index in range(len(table.layout.tensors)):
        ranker.rank(index, None if scores is None else scores.pop(index, None))
    return ranker.result().positions


class Selection:
    """A budget of scalar weights of one model, as one flat trainable vector. Made by `unmask.select`.

    Attributes:
        model: The model, frozen but for ``dense``.
        method: The method.
        values: (B,) trainable float32 (float64 for a float64 model), one slot per scalar weight that is or will be
            unmasked, in order of unmasking; slots not in use are 0. The master copy of the selected weights: what is written
            into it, by an optimizer or by other means, is in the model at the next forward, `delta` and `state_dict` (see
            `writing`). Its ``grad`` is spent by the optimizer's step, so ``model.zero_grad()``, which does not reach it, does
            no harm. Under ``leaving="kept"`` it is (N,), N being all eligible weights, since any of them may be tuned: it then
            takes the memory of full fine-tuning, as the paper's repeat-S needs.
        budget: B; for `unmask.full` the number of weights it trains.
        step: Optimizer steps taken; the next one is step t = ``step``.
        used: Slots in use, b(step - 1), or fewer as long as fewer weights have had a gradient; under ``leaving="kept"`` the
            number of weights ever tuned, in order of first pick.
        dense: Tensors trained whole, outside the budget.
        clip_scope: Which norm `unmask.clip_grad_norm_` clips by.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        eligible: list[str],
        dense: list[str],
        budget: int,
        accumulation: Accumulation,
        new: list[str] | None,
        gradients: Gradients,
        reducer: ProcessReducer,
        clip_scope: ClipScope = "selected",
        values: nn.Parameter | None = None,
        ties: Ties | None = None,
    ) -> None:
        parameters, tensors = named_parameters(model), weights(model)
        self.model, self.method, self.step, self.used = model, method, 0, 0
        self.clip_scope: ClipScope = clip_scope
        gradients = "dense" if clip_scope == "all" else gradients
        self._layout = reducer.layout(model, tensors, eligible)
        self._flags = {name: p.requires_grad for name, p in parameters.items()}
        self._buffers = {name: b.detach().clone() for name, b in persistent_buffers(model).items()}
        self._new = new
        device = parameters[(eligible or dense)[0]].device
        double = any(t.dtype == torch.float64 for t in self._layout.tensors)
        dtype = torch.float64 if double else torch.float32
        self._slots = budget if eligible else 0
        kept = method.leaving == "kept"
        room = self._layout.total if kept else self._slots
        zeros = torch.zeros(room, dtype=dtype, device=device)
        self.values = nn.Parameter(zeros) if values is None else _emptied(values, zeros)
        self._table = SlotTable(self._layout, self._slots, dtype, device, room)
        self._picked = torch.empty(0, dtype=torch.int64, device=device) if kept else None  # the last step's, as slots
        self._ordered = self._known_order()  # before freezing: a calibration wants the model as it was
        if self._ordered:
            refuse_dead_lora(model, {*dense, *(self._layout.names[i] for i in self._table.occupied())})
        if method.unselected == "zero":
            self._table.zero_rest()
        model.requires_grad_(False)
        self.dense = [DenseTensor(name, parameters[name]) for name in dense]
        self.budget = budget
        if method.whole:
            self.budget = self.used = sum(d.parameter.numel() for d in self.dense)
        self._reducer = reducer
        described = facts_of_method(method, self._slots) | {"budget": self.budget, "accumulation": accumulation}
        described |= {"the eligible tensors": self._layout.names, "the tensors trained whole": dense}
        reducer.expect(described, self._to_agree_on, self._progress, device)
        self._dense_gradients = DenseGradients(self.dense, self._reducer)
        sampled, measured = gradients != "dense", clip_scope == "all"
        self._window = Window(self._table, self.values, method, accumulation, sampled, self._reducer, measured)
        training = weakref.ref(model)
        self._taps = TapSet(self._layout.tensors, self._window, lambda: bool((m := training()) and m.training))
        self._taps.owner = self
        self._taps.writes, self._taps.take_in = self._window.writes, self._take_in
        self._writing = self._copied = False
        if gradients != "dense":
            self._taps.handlers = handlers(dense=gradients == "auto")
        settle(model, self._layout.tensors)
        self._bias_hooks = reach_biases(model)
        if eligible:
            watch_forwards(model, self._taps)
        for tensor in self.dense:
            tensor.owner = self
        self._forward_hooks = catch_up_before_forward(model, self.dense)
        if self._reducer.sharded is not None:
            self._forward_hooks += catch_up_before_gather(model, self._taps.catch_up)
        self._released = False
        self._identity = Identity(self, ties or Ties(model))
        self._taps.check = partial(self._identity.check, places=False)
        self._begin_step()
        watch(self)
        try:
            self._reducer.join()
        except SelectionError:
            self.release()
            raise

    _said_missing = False

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains: ``values``, then the dense tensors (their float32 masters, if they are half)."""
        return ([self.values] if self._slots else []) + [d.master for d in self.dense]

    @property
    def indices(self) -> dict[str, Tensor]:
        """Unmasked weights by tensor name: sorted int64 flat (row-major) indices, on the CPU. Tensors with none are left out."""
        if self.method.whole:
            return {d.name: torch.arange(d.parameter.numel()) for d in self.dense}
        return self._named(self._table.positions[: self.used])

    @property
    def picked(self) -> dict[str, Tensor]:
        """The weights that had a gradient in the last step, as `indices`.

        Under ``leaving="kept"`` they are the B last picked, of all that were ever tuned; for every other method they are
        ``indices``.

        Example:
            >>> import unmask
            >>> selection = unmask.select(nn.Linear(8, 4), unmask.repeat_d3(budget=3, leaving="kept"))
            >>> optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
            >>> for column in range(2):
            ...     selection.model(torch.eye(8)[column]).sum().backward()
            ...     optimizer.step()
            >>> sum(flat.numel() for flat in selection.picked.values()), selection.budget, selection.used >= 3
            (3, 3, True)
        """
        return self.indices if self._picked is None else self._named(self._table.positions[self._picked])

    def _named(self, positions: Tensor) -> dict[str, Tensor]:
        return {self._layout.names[i]: flat.cpu() for i, flat, _ in self._layout.split(positions)}

    @property
    def dense_numel(self) -> int:
        """How many weights are trained outside the budget."""
        return 0 if self.method.whole else sum(d.parameter.numel() for d in self.dense)

    def delta(self, base: str | None = None, order: bool = False) -> SparseDelta:
        """What training changed, as an exact delta to the base model.

        Args:
            base: The base model's id or folder, for the metadata; None for what the model's config says.
            order: Keep the order of unmasking too (4 bytes a weight), so that `unmask.analysis` can read off smaller budgets.

        Raises:
            SelectionError: ``order`` of repeat-S, which picks weights more than once, the selection was released, or the
                model is no longer what was selected from (`unmask.selection.identity`).
        """
        self._alive("delta")
        self.check_model()
        self._refuse_uncounted()
        return record_delta(self, base, order)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs beside the optimizer's own state: O(B) tensors and plain values.

        Safe for ``torch.save`` and ``torch.load(weights_only=True)``. Take it between steps: the gradients of an
        unfinished accumulation are not part of it.
        """
        self._alive("state_dict")
        if self._follows():
            self._refuse_uncounted()
        return state_of(self) | ({"copied": True} if self._copied else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a saved selection on this model, exactly; nothing is changed if the state does not fit.

        Raises:
            SelectionError: The state is of another method, budget or model.
        """
        self._alive("load_state_dict")
        with self._reducer.loading(state):
            restore(self, state)
        self._window.writes.take()
        self._copied = bool(state.get("copied", False))
        self._begin_step()

    def release(self) -> None:
        """Ends the selection: the model is an ordinary model again, with the trained weights and its own requires_grad flags.

        A quantised layer keeps its sidecar; ``unmask.quantised.detach(model)`` takes it off.
        """
        if self._released:
            return
        self.catch_up()
        unwatch(self)
        self._reducer.leave()
        reshard(self.model)
        self._taps.remove()
        self._dense_gradients.remove()
        settle(self.model, self._layout.tensors)
        unwatch_forwards(self.model)
        for hook in [*self._bias_hooks, *self._forward_hooks]:
            hook.remove()
        for tensor in self.dense:
            tensor.release()
        for name, parameter in named_parameters(self.model).items():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        self._identity.release()
        self._released = True

    @property
    def in_use(self) -> int:
        """Slots that the coming optimizer step trains: the first ``in_use`` of ``values``."""
        return self._slots if self.method.whole else self._window.due

    def __repr__(self) -> str:
        dense = f", dense={self.dense_numel:,}" if self.dense_numel else ""
        of = f"of {self.budget:,}" if self._picked is None else f"at {self.budget:,} a step"
        return f"Selection({self.method.name}, used={self.used:,} {of}, step={self.step}{dense})"

    def _to_agree_on(self) -> dict[str, Tensor]:
        """What several processes must hold alike before they train together."""
        tensors = {} if self._reducer.sharded else {n: self._layout.plain(i) for i, n in enumerate(self._layout.names)}
        tensors |= {d.name: d.parameter.detach() for d in self.dense}
        return tensors | {"the order of unmasking": self._table.positions}

    def _progress(self) -> tuple[int, list[Tensor]]:
        """The step; and what training has made by then: `values`, and of the dense tensors another one at each step."""
        turn = self.step % max(1, len(self.dense))
        return self.step, [
            t.detach() for t in (self.values[: self.used], *(d.master for d in self.dense[turn : turn + 1]))
        ]

    # What the optimizer hooks call (see stepping.py).

    def clock(self) -> Tensor:
        """The parameter whose optimizer step is the schedule's step."""
        return self.parameters()[0]

    def owns(self, parameter: Tensor) -> bool:
        """Whether a parameter is a tensor of the model that another one stands for in the optimizer."""
        if owner_of(parameter) is self or self._layout.holds(parameter):
            return True
        rounded = [d.parameter for d in self.dense if d.master is not d.parameter]
        return any(parameter is p for p in [*rounded, *stored_in(self._layout.tensors)])

    def trains_beside(self, held: Sequence[Tensor]) -> bool:
        """Whether there are dense tensors beside ``values`` among some parameters."""
        return bool(self._slots) and any(d.master is p for d in self.dense for p in held)

    def has_gradient(self) -> bool:
        """Whether a backward has reached the selection since the last step."""
        window = self._window
        if window.plan.selecting and window.tentative is None and window.nonfinite is None:
            return False
        return any(p.grad is not None for p in ([self.values] if self._slots else self.parameters()))

    def nonfinite(self) -> str | None:
        """What is not finite among this step's gradients, if anything."""
        if self._window.nonfinite:
            return self._window.nonfinite
        if self.values.grad is not None and not torch.isfinite(self.values.grad).all():
            return "the gradient of the selected weights is not finite"
        for tensor in self.dense:  # one cheap pass: a sum of finite float32 gradients does not overflow in practice
            if tensor.master.grad is not None and not torch.isfinite(tensor.master.grad.sum()):
                return f"the gradient of {tensor.name!r} is not finite"
        return None

    def check_model(self) -> None:
        """Refuses a model that is no longer what was selected from; see `unmask.selection.identity`."""
        self.catch_up()
        self._identity.check()

    def before_step(self, optimizer: Optimizer) -> None:
        """A slot that changes hands starts with fresh optimizer state."""
        self._reducer.stepping(optimizer)
        tentative = self._window.tentative
        if not self._window.plan.exchanging or tentative is None:
            return
        clear_state(optimizer.state.get(self.values, {}), self.values, tentative.slots)

    @torch.no_grad()
    def after_step(self) -> None:
        """Commits the tentative selection, writes ``values`` into the tensors, advances the schedule."""
        window, plan = self._window, self._window.plan
        tentative = window.tentative
        if tentative is not None:
            if plan.exchanging:  # what leaves goes back to its base value
                leaving = self._table.positions[tentative.slots]
                held = leaving >= 0
                self._layout.write(leaving[held], self._table.base[tentative.slots][held])
            self._table.assign(tentative.slots, tentative.positions, tentative.weights)
            self._picked = tentative.picked
        elif plan.selecting:
            raise ScheduleNotRunError(
                "the optimizer stepped without calling its closure, so no backward selected any weight."
            )
        if not self.method.whole:
            self.used = window.due
        self._table.scatter(self.values, self.used)
        window.writes.take()
        self.values.grad = None  # spent; a Trainer's model.zero_grad() would not reach it
        self.step += 1
        self._begin_step()
        if tentative is not None and tentative.missing:
            self._say_missing(plan, tentative.missing)

    def _say_missing(self, plan: Plan, missing: int) -> None:
        """Warns once that a step selected less than was due, and why."""
        if self._said_missing:
            return
        self._said_missing = True
        if plan.picked is not None and missing < plan.newcomers:
            then = "No other weight has a gradient until the next selecting step"
        elif plan.repeat and plan.used:
            then = "The other picks stay what they were"
        else:
            then = "What is due is unmasked at the next step that has a gradient for it"
        warnings.warn(
            f"step {plan.step} was to select {plan.newcomers:,} weights and selected {plan.newcomers - missing:,}: the "
            f"{self.method.heuristic.name} score of all others is zero, since their gradient is, which does not tell one from "
            "another (all labels of the batch are -100, say, or the loss does not reach the eligible tensors). "
            f"{then}; this is said once.",
            UnmaskWarning,
            stacklevel=2,
        )

    def sync_dense(self, held: Sequence[Tensor]) -> None:
        """Rounds those dense tensors' masters into the model that an optimizer holds."""
        for tensor in self.dense:
            if any(tensor.master is p for p in held):
                tensor.sync()

    # Writes into ``values`` outside an optimizer's step.

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Says that what is written into ``values`` inside is no copy from before some weight was unmasked.

        Where the order of unmasking is known from the start (`unmask.pafi`, `unmask.random_mask`, `unmask.fish`), writes need no
        such word. Where gradients pick the weights, a copy of ``values`` made earlier (an average's, Lookahead's) holds 0 for
        what was unmasked since, and writing it back drags those weights towards 0; so writes outside this block are refused.

        Raises:
            SelectionError: A backward has selected weights that no optimizer step has unmasked yet.

        Example:
            >>> import unmask
            >>> model = nn.Linear(8, 4)
            >>> selection = unmask.select(model, unmask.id3(budget=6, steps=2))
            >>> optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
            >>> model(torch.ones(8)).sum().backward()
            >>> optimizer.step()
            >>> with selection.writing(), torch.no_grad():
            ...     _ = selection.values.clamp_(-0.1, 0.1)
            >>> len(selection.delta())
            3
        """
        self._alive("writing")
        if self._window.tentative is not None:
            raise SelectionError(
                "writing() between a backward that selects weights and its optimizer.step(): these weights have no slot yet. "
                "Write before loss.backward(), or after optimizer.step()."
            )
        self._writing = True
        try:
            yield
            self.catch_up()
        finally:
            self._writing = False

    @torch.no_grad()
    def weights_of(self, model: nn.Module) -> Tensor:
        """What a copy of the model (an average of it, say) holds where this selection has slots.

        Args:
            model: It has the selected tensors under their names.

        Returns:
            (B,), of the dtype of ``values``; 0 for slots not in use. Under `writing`, ``values.copy_(...)`` takes it over.

        Raises:
            SelectionError: A selected tensor is missing, or of another shape.

        Example:
            >>> import copy, unmask
            >>> selection = unmask.select(nn.Linear(8, 4), unmask.random_mask(budget=6))
            >>> torch.equal(selection.weights_of(copy.deepcopy(selection.model)), selection.values)
            True
        """
        parameters, held = dict(model.named_parameters()), torch.zeros_like(self.values)
        for index, flat, slots in self._layout.split(self._table.positions[: self.used]):
            name, tensor = self._layout.names[index], self._layout.tensors[index]
            other = parameters.get(name)
            if other is None or other.shape != tensor.shape:
                given = "lacks it" if other is None else f"has it with shape {tuple(other.shape)}"
                raise SelectionError(
                    f"{name!r} has selected weights and shape {tuple(tensor.shape)}; the given model {given}. Give a copy of the "
                    "model that was selected from (of an AveragedModel: its .module)."
                )
            held[slots] = take(other.detach(), flat).to(held)
        return held

    def catch_up(self) -> None:
        """Brings what was written into ``values``, and into the masters of dense tensors, to the model.

        Forwards, `delta`, `state_dict` and `release` do this by themselves.

        Raises:
            SelectionError: Gradients pick the weights, and the write was not made under `writing`.
        """
        self._taps.catch_up()
        for tensor in self.dense:
            tensor.catch_up()

    @torch.no_grad()
    def _take_in(self) -> None:
        """There are new writes into ``values``."""
        sharded = self._reducer.sharded is not None
        if self._known or self._writing or self._copied:
            if sharded:
                reshard(self.model)
            self._table.scatter(self._held(), self.used)
        else:
            moved = self._layout.names[0] if sharded else self._differing()
            if moved is not None:
                raise stale_write(self.method.name, moved)
        self._window.writes.take()

    @property
    def _known(self) -> bool:
        """Whether every weight has its slot from the start, so that no copy of ``values`` holds anything else there."""
        return self.method.whole or (self._ordered and self.method.strategy == "static")

    def _held(self) -> Tensor:
        """``values`` without what a selection that waits for its step has put there: (B,)."""
        tentative = self._window.tentative
        if tentative is None or not self._window.plan.exchanging:
            return self.values.detach()
        held = self.values.detach().clone()
        held[tentative.slots] = tentative.displaced
        return held

    def _differing(self) -> str | None:
        """The name of a tensor that holds other weights than ``values``, if there is one."""
        table, tentative, held = self._table, self._window.tentative, self._held()
        if tentative is not None and not same(self.values.detach()[tentative.slots], tentative.weights):
            return self._layout.names[next(self._layout.split(tentative.positions))[0]]
        for index in table.occupied():
            members = table.members(index)
            entries = members if members is None or self.used >= table.held else members.below(self.used)
            if entries is None:
                continue
            weights = take(self._layout.plain(index), entries.flat)
            if not same(held[entries.slots].to(weights), weights):
                return self._layout.names[index]
        return None

    def _follows(self) -> bool:
        """Whether the model still holds what was selected from, with what was written into ``values`` taken in.

        If not, what was trained is in ``values`` all the same, so that a state can be saved.
        """
        try:
            self._identity.check_structure()
        except SelectionError:
            return False
        self.catch_up()
        try:
            self._identity.check()
        except SelectionError:
            return False
        return True

    @torch.no_grad()
    def _refuse_uncounted(self) -> None:
        """Before anything is saved: refuses writes that torch's counters do not show."""
        if self._reducer.sharded is not None:
            return  # to compare shards is a call of all processes together
        name = self._differing()
        if name is not None:
            raise SelectionError(
                f"selection.values and the selected weights of {name!r} hold different numbers, and no counted write explains "
                "it: either the model's tensor was written to, or the memory of values was, past torch (NumPy, a tensor that "
                "shares its storage). Write into selection.values instead, through torch. If values are right as they are: "
                "`with selection.writing(): selection.values.data = selection.values.detach().clone()`."
            )

    def check_writes(self) -> None:
        """An optimizer's step begins: refuses writes since the last forward that may be of a stale copy."""
        if not self._known:
            self._taps.catch_up()

    def check_optimizer(self, optimizer: Optimizer, before: Tensor | None) -> None:
        """An optimizer's step has run: it must keep no copy of slots whose weights are not known yet.

        Args:
            optimizer: It holds ``values``.
            before: (B,) what ``values`` held when the step began, if that is known.

        Raises:
            SelectionError: It keeps such a copy, and the method unmasks weights later on.
        """
        used = self._window.due
        name = None if self._known else copy_in(optimizer, self.values, before, used)
        if name is None:
            return
        if self.method.strategy == "static" and optimizer.state[self.values][name][:used].any():
            self._copied = True  # made when every weight had its slot
            return
        if before is not None:
            with torch.no_grad(), self._window.writes.own():
                self.values.copy_(before)
        raise copying_optimizer(optimizer, name, self.method.name)

    @property
    def copies_matter(self) -> bool:
        """Whether `check_optimizer` wants to know what ``values`` held: at the first step of a method that picks by gradient."""
        return self.step == 0 and not self._known

    # The schedule.

    def _begin_step(self) -> None:
        self._taps.forget()
        t, used = self.step, self.used
        due = self.method.cumulative(t, self._slots)
        if self._ordered:
            with torch.no_grad(), self._window.writes.own():
                self.values[used:due] = self._table.base[used:due]
            if self.method.strategy == "static":  # known before the first step
                self.used = used = due
            self._window.start(Plan(t, used, due, 0, repeat=False))
        elif self.method.strategy == "repeat":
            again = t % self.method.schedule.stride == 0 or not used  # no step has had a gradient to pick by
            active = 0 if again and self._picked is not None else used
            self._window.start(Plan(t, used, active, self._slots if again else 0, repeat=True, picked=self._picked))
        else:
            self._window.start(Plan(t, used, used, due - used, repeat=False))

    def _known_order(self) -> bool:
        """Ranks the whole budget now, where the heuristic needs no gradient and the ranking cannot change later."""
        method, table = self.method, self._table
        if not self._slots or method.heuristic.needs == "gradient" or method.strategy == "repeat":
            return False
        scores = estimates(self.model, self._layout, method, self._slots)
        positions = known_positions(method, table, self._slots, scores).to(self.values.device)
        table.load(positions, self._layout.read(positions, self.values.dtype))
        return True

    def _alive(self, what: str) -> None:
        if self._released:
            raise SelectionError(f"{what}() after release(): this selection has ended; call it before.")
