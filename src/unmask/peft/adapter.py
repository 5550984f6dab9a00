"""Adapter: one delta on a base. It knows if its values are in the base's tensors just now.

An adapter that trains has a live `unmask.Selection`, made at its first forward: an optimizer is built, the model is moved to
its device and T is known by then. When the selection ends (another adapter becomes active, the model moves), the adapter keeps
its slots, and the next forward goes on from them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from unmask.delta.fingerprint import same_bits
from unmask.errors import MethodError, ScheduleNotRunError
from unmask.gradients.wrappers import named_parameters
from unmask.integrations.support import Attempt
from unmask.peft.config import OPTIONS, SelectiveConfig
from unmask.peft.saving import Progress
from unmask.ranking.ledger import Layout, Ledger, Slots
from unmask.selection.select import known_positions, select
from unmask.selection.selection import Selection
from unmask.selection.stepping import Steppable, unwatch, watch


class Adapter:
    """One delta on a base model.

    Attributes:
        config: Its configuration.
        budget: B.
        layout: The eligible tensors, by the base's names of them.
        values: (B,) the parameter that an optimizer trains.
        ledger: Its slots while it does not train.
        whole: Further tensors of the base that the adapter sets whole, by the base's names: buffers that its training
            changed, and tensors that the base's checkpoint lacks.
        selection: The live selection, while it trains.
        written: True if its values are in the base's tensors.
        attempt: The Trainer's attempt at a run that it is trained in, if one is.
        asked: True if ``config.total_steps`` was the Trainer's.
    """

    def __init__(self, config: SelectiveConfig, budget: int, parameters: Mapping[str, nn.Parameter]) -> None:
        self.config, self.budget = config, budget
        self.layout = layout = Layout(list(parameters), list(parameters.values()))
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in layout.tensors) else torch.float32
        zeros = torch.zeros(budget, dtype=dtype, device=layout.tensors[0].device)
        self.values = nn.Parameter(zeros, requires_grad=False)
        self.ledger = Ledger(layout, self.values, budget)
        self.whole: dict[str, Tensor] = {}
        self.selection: Selection | None = None
        self.written = False
        self.attempt: Attempt[tuple[Slots, dict[str, Tensor]]] | None = None
        self.asked = False
        self._waiting = Waiting(self.values, list(parameters.values()))
        self._absent = False
        method = config.build(budget)
        known = method.strategy == "static" and method.heuristic.needs not in ("gradient", "calibration")
        if known and not config.inference_mode and not any(tensor.is_meta for tensor in layout.tensors):
            # ``values`` get the weights that the first forward will give them, since an averager may copy them before.
            with torch.no_grad():
                positions = known_positions(method, self.ledger).to(self.values.device)
                self.values.copy_(layout.read(positions, self.values.dtype))
                self.ledger.writes.take()

    @property
    def live(self) -> Ledger:
        """The ledger that holds its slots just now: that of the live selection, or its own."""
        return self.ledger if self.selection is None else self.selection.ledger

    def slots(self) -> Slots:
        """Returns copies of its slots."""
        slots = self.live.snapshot()
        # Without a selection, a slot that is not in use may hold the weight that the first forward will give it.
        return slots if self.selection is not None else replace(slots, values=self.values.detach().clone())

    @property
    def used(self) -> int:
        """The number of slots in use."""
        return self.live.used

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return self.live.step

    def catch_up(self) -> None:
        """Brings new writes into ``values`` to the base's tensors, if they hold this adapter's values."""
        if self._absent or not self.written:
            return
        if self.selection is not None:
            self.selection.catch_up()
        elif self.live.writes.new:
            self._rewrite()

    def converted(self) -> None:
        """Writes the values again after the base was moved or cast: tensors of a wider dtype may hold them more exactly."""
        moved = self.ledger.positions.device != self.values.device  # then `move` comes next
        if self.written and not self._absent and not moved:
            self.live.rebuild()  # on the tensors' devices
            self._rewrite()
        if self.selection is not None:
            self.live.writes.take()

    def _rewrite(self) -> None:
        self.live.scatter()
        self.ledger.writes.take()

    # Training.

    def start(self, model: nn.Module) -> None:
        """Starts the live selection, on the device where the base is now. The values must be in the tensors."""
        self.expect(False)
        # PEFT ignores ``normalise`` in a config, with a warning, so this looks at the method in the adapter's record.
        recorded = (self.config.record or {}).get("method")
        if isinstance(recorded, Mapping) and "normalise" in recorded:
            raise MethodError(
                f"this adapter was trained with normalise = {recorded['normalise']!r}, which unmask no longer has, so it cannot "
                "be trained further here; load it with is_trainable=False, or train it with the version of unmask that saved it."
            )
        held = self.slots()
        self.layout.write(held.positions[: held.used], held.base[: held.used])  # selecting starts from base weights
        names = {id(p): name for name, p in named_parameters(model).items()}
        pattern = "|".join(re.escape(names[id(p)]) for p in self.layout.tensors)
        method = self.config.build(self.budget)
        options = {name: getattr(self.config, name) for name in OPTIONS}
        with _others_left(model, self.layout):
            selection = select(model, method, include=f"^(?:{pattern})$", new=[], values=self.values, **options)
        selection.leave_forwards()
        if held.step or held.used:
            selection.load_state_dict({**selection.state_dict(), **held.entries(), "buffers": {}})
        self.selection = selection

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

    def load(self, slots: Slots) -> None:
        """Takes over slots, while it neither trains nor is written, or while the tensors hold just these values."""
        self.ledger.load(slots)
        self.values.grad = None
        if not self._absent:
            self.ledger.writes.take()

    def move(self) -> None:
        """Follows ``values`` to another device."""
        self.stop()
        self.ledger.load(self.slots())
        self.ledger.writes.take()
        if self.written:
            self.expect(self.values.requires_grad)

    def expect(self, training: bool) -> None:
        """Makes an optimizer's step before the next forward an error if ``training``, else allows it."""
        (watch if training else unwatch)(self._waiting)

    # In and out of the tensors.

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the adapter's values into the base's tensors."""
        _copy(self.whole, tensors)
        self._rewrite()
        self.written = True

    def withdraw(self, base_whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Puts the base's values back, bit for bit, and ends training."""
        self.stop()
        slots = self.slots()
        self.layout.write(slots.positions[: slots.used], slots.base[: slots.used])
        self.whole = {name: tensors[name].detach().clone() for name in changed(base_whole, tensors)}
        _copy({name: base_whole[name] for name in self.whole}, tensors)
        self.written = False
        self.values.grad = None

    @contextlib.contextmanager
    def absent(self, base_whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Gives the base's tensors the base's values inside the block. Afterwards they hold the adapter's again.

        Training goes on afterwards. A graph that was built before, and whose backward is still to come, stays valid: autograd
        does not count these writes, and after the block the values are the same. Inside the block its backward would be wrong.
        """
        slots = self.slots()
        positions = slots.positions[: slots.used]
        touched = [self.layout.plain(index) for index, _, _ in self.layout.split(positions)]
        current, whole = self.layout.read(positions, slots.base.dtype), {n: tensors[n].clone() for n in base_whole}
        self._absent = True
        if self.selection is not None:
            self.selection.pause()
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
                    self.selection.resume()

    @contextlib.contextmanager
    def paused(self, base_whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Takes this adapter, which trains, out of the tensors inside the block. Its graph and gradient stay valid.

        Preference optimization needs this for a reference adapter, between the policy's forward and its backward.
        """
        selection = self.selection
        assert selection is not None
        with self.absent(base_whole, tensors):
            gradient, self.values.grad = self.values.grad, None
            selection.unwatch()  # an optimizer that steps now does not train this adapter
            self.written = False
            yield
        self.written = True
        self.values.grad = gradient
        selection.watch()

    # Saving and copying.

    def progress(self) -> Progress | None:
        """Returns what training needs to go on from the saved values; None before the first step, or if the config says so."""
        if self.step == 0 or not self.config.training_state:
            return None
        slots = self.slots()
        order = slots.positions[: slots.used].argsort()
        rounded = any(tensor.dtype != self.values.dtype for tensor in self.layout.tensors)
        masters = slots.values[order].cpu() if rounded else None
        return Progress(order.to("cpu", torch.int32 if slots.used < 2**31 else torch.int64), masters)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy, or a pickle, takes over: it is not live, and has the slots that this adapter has now."""
        ledger = self.ledger.copy_of(self.slots())
        return {**vars(self), "ledger": ledger, "selection": None, "attempt": None, "_absent": False}


def changed(base_whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of those tensors that differ from the base's."""
    return [name for name, original in base_whole.items() if not same_bits(original.to(tensors[name]), tensors[name])]


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into others of the same names."""
    for name, tensor in source.items():
        tensors[name].copy_(tensor)


@contextlib.contextmanager
def _others_left(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Keeps the flags of all other parameters inside the block: a selection freezes a whole model, with modules_to_save."""
    mine = {id(tensor) for tensor in layout.tensors}
    flags = [(p, p.requires_grad) for p in model.parameters() if id(p) not in mine]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class Waiting(Steppable):
    """Refuses an optimizer's step that would train nothing: no forward has started the adapter's selection yet."""

    def __init__(self, values: nn.Parameter, tensors: Sequence[nn.Parameter]) -> None:
        self.model = nn.Module()  # no model has a live selection for it yet
        self.values = values
        self._tensors = tensors

    def owns(self, parameter: Tensor) -> bool:
        """Returns True if an optimizer that holds this parameter was built from the base."""
        return any(parameter is tensor for tensor in self._tensors)

    def before_step(self, optimizer: Any) -> None:
        """Refuses the step of an optimizer on values that no forward knows of, with a `ScheduleNotRunError`."""
        raise ScheduleNotRunError(
            "optimizer.step() was called, but no forward in grad mode has gone through the PEFT model since the adapter was "
            "added, made active or moved, so nothing would be trained. Call the PEFT model (or its base model) itself, not "
            "a module inside it, and put it in training mode first: model.train()."
        )
