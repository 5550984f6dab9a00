"""Adapter: one delta on a base, and whether its values are in the base's tensors just now.

An adapter that trains has a live `unmask.Selection`, made at its first forward: an optimizer is built, the model moved to
its device and T known by then. Whatever ends the selection (another adapter, another device) keeps the adapter's state here,
and the next forward goes on from it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from unmask.delta.delta import SparseDelta, SparseTensor
from unmask.delta.fingerprint import same_bits
from unmask.errors import DeltaError, MethodError, ScheduleNotRunError
from unmask.gradients.entries import put
from unmask.gradients.wrappers import named_parameters
from unmask.gradients.writes import Writes
from unmask.integrations.support import Attempt
from unmask.peft.config import SelectiveConfig
from unmask.peft.progress import Progress
from unmask.ranking.ledger import Layout, SlotTable
from unmask.selection.select import select
from unmask.selection.selection import Selection, known_positions
from unmask.selection.state import state_of
from unmask.selection.stepping import unwatch, watch


@dataclass
class Slots:
    """An adapter's slots at rest.

    Attributes:
        positions: (B,) int64 places among the eligible weights; -1 for a slot not in use.
        base: (B,) the base's weights there.
        values: (B,) the adapter's weights there, masters of what the tensors hold.
        used: Slots in use.
        step: Optimizer steps taken.
    """

    positions: Tensor
    base: Tensor
    values: Tensor
    used: int = 0
    step: int = 0


class Adapter:
    """One delta on a base model.

    Attributes:
        config: Its configuration.
        budget: B.
        layout: The eligible tensors, by the base's names of them.
        values: (B,) the parameter that an optimizer trains.
        whole: Further tensors of the base that the adapter sets whole, by the base's names: buffers that its training
            changed, and tensors that the base's checkpoint lacks.
        selection: The live selection, while it trains.
        written: Whether its values are in the base's tensors.
        attempt: The Trainer's attempt at a run that it is trained in, if one is.
        asked: Whether ``config.total_steps`` was the Trainer's.
    """

    def __init__(self, config: SelectiveConfig, budget: int, parameters: Mapping[str, nn.Parameter]) -> None:
        self.config, self.budget = config, budget
        self.layout = Layout(list(parameters), list(parameters.values()))
        first, double = self.layout.tensors[0], any(t.dtype == torch.float64 for t in self.layout.tensors)
        zeros = torch.zeros(budget, dtype=torch.float64 if double else torch.float32, device=first.device)
        self.values = nn.Parameter(zeros, requires_grad=False)
        self.whole: dict[str, Tensor] = {}
        self.selection: Selection | None = None
        self.written = False
        self.attempt: Attempt[tuple[Slots, dict[str, Tensor]]] | None = None
        self.asked = False
        self._positions = torch.full((budget,), -1, dtype=torch.int64, device=first.device)
        self._base = torch.zeros_like(zeros)
        self._used = self._step = 0
        self._waiting = Waiting(self.values, list(parameters.values()))
        self._foresee()
        self._writes = Writes(self.values)  # while no selection is live
        self._absent = False

    def slots(self) -> Slots:
        """What it holds; copies."""
        if self.selection is None:
            return Slots(
                self._positions.clone(), self._base.clone(), self.values.detach().clone(), self._used, self._step
            )
        state = state_of(self.selection)
        return Slots(*(state[key] for key in ("positions", "base", "values", "used", "step")))

    @property
    def used(self) -> int:
        """Slots in use."""
        return self._used if self.selection is None else self.selection.used

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._step if self.selection is None else self.selection.step

    @torch.no_grad()
    def _foresee(self) -> None:
        """Gives ``values`` what the first forward will, where that is known: an averager may copy them before it."""
        method = self.config.build(self.budget)
        if method.strategy != "static" or method.heuristic.needs in ("gradient", "calibration"):
            return
        if self.config.inference_mode or any(tensor.is_meta for tensor in self.layout.tensors):
            return
        table = SlotTable(self.layout, self.budget, self.values.dtype, self.values.device)
        positions = known_positions(method, table, self.budget).to(self.values.device)
        self.values.copy_(self.layout.read(positions, self.values.dtype))

    def catch_up(self) -> None:
        """Brings what was written into ``values`` to the base's tensors, if they hold this adapter's values."""
        if self._absent or not self.written:
            return
        if self.selection is not None:
            self.selection.catch_up()
        elif self._writes.new:
            self._rewrite()

    @property
    def pending(self) -> bool:
        """Whether there are writes into ``values`` that `catch_up` has not seen."""
        return (self._writes if self.selection is None else self.selection._window.writes).new

    def converted(self) -> None:
        """The base and ``values`` were moved or cast: the same numbers, which tensors of a wider dtype may hold better now."""
        if self.written and not self._absent and self._positions.device == self.values.device:  # else `move` comes next
            self._rewrite()
        if self.selection is not None:
            self.selection._window.writes.take()

    def _rewrite(self) -> None:
        slots = self.slots()
        self.layout.write(slots.positions[: slots.used], slots.values[: slots.used])
        self._writes.take()

    # Training.

    def start(self, model: nn.Module) -> None:
        """Makes the live selection, on the device where the base is now. The values must be in the tensors."""
        self.expect(False)
        self._refuse_retired()
        held = self.slots()
        self.layout.write(held.positions[: held.used], held.base[: held.used])  # selecting starts from base weights
        names = {id(p): name for name, p in named_parameters(model).items()}
        pattern = "|".join(re.escape(names[id(p)]) for p in self.layout.tensors)
        with _others_left(model, self.layout):
            selection = select(
                model,
                self.config.build(self.budget),
                include=f"^(?:{pattern})$",
                new=[],
                accumulation=self.config.accumulation,  # type: ignore[arg-type]  # checked by SelectiveConfig
                gradients=self.config.gradients,  # type: ignore[arg-type]
                exchange=self.config.exchange,  # type: ignore[arg-type]
                clip_scope=self.config.clip_scope,  # type: ignore[arg-type]
                values=self.values,
            )
        selection._identity.leave_to_peft()
        if held.step or held.used:
            selection.load_state_dict({**selection.state_dict(), **vars(held), "buffers": selection._buffers})
        self.selection = selection

    def _refuse_retired(self) -> None:
        """Refuses to train on an adapter whose method had a part that unmask no longer has; it may still be used.

        PEFT ignores the setting itself, with a warning, so the method of the record is what tells.

        Raises:
            MethodError: It has such a part.
        """
        method = (self.config.record or {}).get("method")
        if isinstance(method, Mapping) and "normalise" in method:
            raise MethodError(
                f"this adapter was trained with normalise = {method['normalise']!r}, which unmask no longer has, so it cannot be "
                "trained further here; load it with is_trainable=False, or train it with the version of unmask that saved it."
            )

    def stop(self) -> None:
        """Ends the live selection, if there is one; the values stay in the tensors."""
        self.expect(False)
        self.catch_up()
        selection = self.selection
        if selection is None:
            return
        held, self.selection = self.slots(), None
        with _others_left(selection.model, self.layout):
            selection.release()
        self.load(held)

    @torch.no_grad()
    def load(self, slots: Slots) -> None:
        """Takes over slots. Neither training nor written, or the tensors hold just these values."""
        self._positions, self._base = slots.positions, slots.base
        self._used, self._step = slots.used, slots.step
        self.values.copy_(slots.values)
        self.values.grad = None
        if not self._absent:
            self._writes.take()

    def move(self) -> None:
        """``values`` is on another device now."""
        self.stop()
        self._positions, self._base = self._positions.to(self.values.device), self._base.to(self.values.device)
        if self.written:
            self.expect(self.values.requires_grad)

    def expect(self, training: bool) -> None:
        """Whether an optimizer's step before the next forward is an error."""
        if training:
            watch(self._waiting)
        else:
            unwatch(self._waiting)

    # In and out of the tensors.

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts its values into the base's tensors."""
        _copy(self.whole, tensors)
        slots = self.slots()
        self.layout.write(slots.positions[: slots.used], slots.values[: slots.used])
        self._writes.take()
        self.written = True

    def withdraw(self, base_whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Puts the base's values back, bit for bit; training ends."""
        self.stop()
        slots = self.slots()
        self.layout.write(slots.positions[: slots.used], slots.base[: slots.used])
        self.whole = {name: tensors[name].detach().clone() for name in changed(base_whole, tensors)}
        _copy({name: base_whole[name] for name in self.whole}, tensors)
        self.written = False
        self.values.grad = None

    @contextlib.contextmanager
    def absent(self, base_whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The base's tensors hold the base inside; afterwards what they held before, and training goes on.

        A graph that was built before and is still to be differentiated stays good: autograd is told that nothing changed, as
        then nothing has. Inside, it would refuse.
        """
        slots = self.slots()
        positions = slots.positions[: slots.used]
        touched = [self.layout.plain(index) for index, _, _ in self.layout.split(positions)]
        current, whole = self.layout.read(positions, slots.base.dtype), {n: tensors[n].clone() for n in base_whole}
        self._absent = True
        if self.selection is not None:
            self.selection._taps.pause()
        with _unsafe_preserve_version_counter((*touched, *(tensors[name] for name in base_whole))):
            self.layout.write(positions, slots.base[: slots.used])
            _copy(base_whole, tensors)
            try:
                yield
            finally:
                self.layout.write(positions, current)
                _copy(whole, tensors)
                self._absent = False
                if self.selection is not None:
                    self.selection._taps.resume()

    # To and from a delta.

    def entries(self) -> dict[str, SparseTensor]:
        """Its part of a delta: the values that the tensors hold, or would hold, at its slots."""
        self.catch_up()
        slots = self.slots()
        sparse = {}
        for index, flat, places in self.layout.split(slots.positions[: slots.used]):
            tensor = self.layout.tensors[index]
            values = slots.values[places].to("cpu", tensor.dtype)
            sparse[self.layout.names[index]] = SparseTensor(flat.cpu(), values, tuple(tensor.shape))
        return sparse

    def initial(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of one of the base's tensors without this adapter's values in it: what its entries lie over."""
        slots, whole = self.slots(), tensor.detach().clone()
        for index, flat, places in self.layout.split(slots.positions[: slots.used]):
            if self.layout.names[index] == name:
                put(whole, flat, slots.base[places])
        return whole

    def progress(self) -> Progress | None:
        """What training needs to go on from the saved values; None if there is nothing to go on with, or it is not wanted."""
        if self.step == 0 or not self.config.training_state:
            return None
        return Progress.of(self.slots(), any(t.dtype != self.values.dtype for t in self.layout.tensors))

    def slots_of(self, delta: SparseDelta, progress: Progress | None = None) -> Slots:
        """A delta's entries as slots; the base's tensors must hold the base.

        Raises:
            DeltaError: The delta does not fit the configuration, or ``progress`` is another delta's.
        """
        bounds = dict(zip(self.layout.names, self.layout.bounds.tolist(), strict=False))
        foreign = [name for name in delta.sparse if name not in bounds]
        if foreign:
            raise DeltaError(
                f"the adapter holds values of {foreign[0]!r}, which the config's target_modules do not cover."
            )
        if len(delta) > self.budget:
            raise DeltaError(f"the adapter holds {len(delta):,} values; the config's budget is {self.budget:,}.")
        slots = Slots(torch.full_like(self._positions, -1), torch.zeros_like(self._base), torch.zeros_like(self.values))
        slots.used, slots.step = len(delta), int(delta.metadata.get("step", 0))
        parts = sorted(delta.sparse.items())
        if parts:
            flat = torch.cat([entry.indices.cpu() + bounds[name] for name, entry in parts])
            slots.positions[: slots.used] = flat.to(slots.positions)
            slots.values[: slots.used] = torch.cat([entry.values.to(slots.values) for _, entry in parts])
            slots.base[: slots.used] = self._base_of(delta, slots.positions[: slots.used])
        if progress is not None:
            progress.check([entry.values for _, entry in parts])
            progress.arrange(slots)
        return slots

    def _base_of(self, delta: SparseDelta, positions: Tensor) -> Tensor:
        """The base's weights at positions; a tensor that the delta brings whole is its own base."""
        base = self.layout.read(positions, self.values.dtype)
        for index, flat, places in self.layout.split(positions):
            whole = delta.whole.get(self.layout.names[index])
            if whole is not None:
                base[places] = whole.reshape(-1)[flat.to(whole.device)].to(base)
        return base

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, is not live."""
        slots = self.slots()
        at_rest = {"_positions": slots.positions, "_base": slots.base, "_used": slots.used, "_step": slots.step}
        return {**vars(self), **at_rest, "selection": None, "attempt": None, "_writes": None, "_absent": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._writes = Writes(self.values)


def changed(base_whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those tensors that differ from the base's."""
    return [name for name, original in base_whole.items() if not same_bits(original.to(tensors[name]), tensors[name])]


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        tensors[name].copy_(tensor)


@contextlib.contextmanager
def _others_left(model: nn.Module, layout: Layout) -> Iterator[None]:
    """A selection freezes and thaws a whole model; what PEFT trains beside it (modules_to_save) keeps its flags."""
    mine = {id(tensor) for tensor in layout.tensors}
    flags = [(p, p.requires_grad) for p in model.parameters() if id(p) not in mine]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class Pause:
    """Takes an adapter that trains out of the tensors, so that its graph and gradient are good afterwards.

    Preference optimization does this with a reference adapter, between the policy's forward and its backward.

    Args:
        adapter: It has a live selection.
        base_whole: The base's version of all that it may set whole.
        tensors: The base's tensors.
    """

    def __init__(self, adapter: Adapter, base_whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        assert adapter.selection is not None
        self.adapter, self._selection = adapter, adapter.selection
        self._inside = contextlib.ExitStack()
        self._inside.enter_context(adapter.absent(base_whole, tensors))
        self._gradient, adapter.values.grad = adapter.values.grad, None
        unwatch(self._selection)  # an optimizer that steps now has nothing of it
        adapter.written = False

    def end(self) -> None:
        """The tensors, which hold the base, hold the adapter's values again; its training goes on."""
        self._inside.close()
        self.adapter.written = True
        self.adapter.values.grad = self._gradient
        watch(self._selection)


class Waiting:
    """Refuses an optimizer's step that would train nothing; see `unmask.selection.stepping.Steppable`.

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
