"""SelectiveLayer: all adapters of one base, and which of them is in the base's tensors.

PEFT's methods put a layer in the place of each module they adapt. Here one layer stands for the whole base and is in no
one's place: the base's own tensors hold the active adapter's values, and of several adapters one is active at a time.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from unmask.delta.base import missing_from_checkpoint
from unmask.delta.delta import SparseDelta
from unmask.delta.fingerprint import digest, fingerprint
from unmask.errors import SelectionError
from unmask.peft.adapter import Adapter, Pause, changed
from unmask.peft.attempt import Attempt, not_known, planned_steps
from unmask.peft.callers import calling_trainer
from unmask.peft.clipping import clip_in
from unmask.peft.ddp import stay_unwrapped
from unmask.peft.progress import Progress
from unmask.peft.targets import Base, saved_whole


class Values(nn.ParameterDict):
    """Every adapter's ``values``, for optimizers to find. A state dict holds deltas in their place (see saving.py)."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module's; but accelerate's ``init_empty_weights`` (``low_cpu_mem_usage``) shall not take the data away."""
        self._parameters[name] = param

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class SelectiveLayer(nn.Module, BaseTunerLayer):
    """The adapters of one base model.

    Attributes:
        adapters: By name.
        new: Names of the base's tensors that its checkpoint lacks; a saved adapter brings them along.
    """

    adapter_layer_names = ("unmask_values",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, or it would be a submodule of its own tuner twice
        self.adapters: dict[str, Adapter] = {}
        self.unmask_values = Values()
        self._active_adapter = []
        base = Base(model)
        self.new = sorted(missing_from_checkpoint(model) & base.tensors.keys())
        self._whole = {name: base.tensors[name].detach().clone() for name in (*base.buffers, *self.new)}
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._disabled = contextlib.ExitStack()  # holds the base restored, while adapters are disabled
        self._left: Adapter | None = None  # whose values it puts back
        self._pause: Pause | None = None  # an adapter that goes on training when it is made active again
        self._digests: dict[str, str] | None = None
        model.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The base."""
        return self._model[0]

    @property
    def active(self) -> Adapter | None:
        """The active adapter; None if there is none, or no other than deleted ones."""
        names = [name for name in self.active_adapters if name in self.adapters]
        return self.adapters[names[0]] if names else None

    def add(self, name: str, adapter: Adapter) -> None:
        """Takes in an adapter that holds nothing yet."""
        self.adapters[name] = adapter
        self.unmask_values[name] = adapter.values

    # PEFT's verbs.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter active: its values go into the tensors, another's out of them.

        Raises:
            ValueError: More than one name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"{names} cannot be active together: each sets weights of the one base. Combine them into one adapter with "
                "add_weighted_adapter(...)."
            )
        old, self._active_adapter = self.active, names
        if not self._disable_adapters:
            self._exchange(old, self.active)
        for name, adapter in self.adapters.items():
            self._train(adapter, name in names and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Takes the active adapter's values out of the tensors, or puts them back; training goes on afterwards."""
        if enabled != self._disable_adapters:
            return
        self._disable_adapters = not enabled
        if not enabled:
            self._left = self.active
            if self._left is not None and self._left.written:
                self._disabled.enter_context(self._left.absent(self._whole, self._tensors()))
        else:
            self._disabled.close()
            self._exchange(self._left, self.active)  # another may have been made active in between
            self._left = None

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; if it was active, the base's weights are back and the next one becomes active."""
        if self._disable_adapters:
            raise SelectionError("delete_adapter() inside disable_adapter(); leave that first.")
        self.settle()
        if adapter_name in self.active_adapters:
            self._exchange(self.active, None)
        self.adapters[adapter_name].expect(False)
        super().delete_adapter(adapter_name)  # chooses the next one
        del self.adapters[adapter_name]

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Makes adapters trainable, or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.adapters:
                self._train(self.adapters[name], requires_grad)

    def get_base_layer(self) -> nn.Module:
        """The base."""
        return self.model

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to do: an active adapter's values are in the weights."""

    def unmerge(self) -> None:
        """Nothing to do; see `merge`."""

    def end(self, keep: bool) -> None:
        """No adapter is left: the base's tensors are ordinary, with the active one's values or the base's own.

        Args:
            keep: Whether the active adapter's values stay.
        """
        active = self.active
        if self._disable_adapters:
            self.enable_adapters(True)
        self.settle()
        for adapter in self.adapters.values():
            adapter.expect(False)
        if active is not None and not keep:
            active.withdraw(self._whole, self._tensors())
        elif active is not None:
            active.stop()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    # Training.

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # starting a selection is nothing to compile
    def before_forward(self) -> None:
        """A forward of the base begins: takes in writes into ``values``, and starts the selection if this one is to train."""
        adapter = self.active
        if adapter is None or self._disable_adapters:
            return
        adapter.catch_up()
        if not torch.is_grad_enabled():
            return
        if not adapter.values.requires_grad:
            adapter.stop()  # the user froze it by hand
            return
        self._follow(adapter)
        if adapter.selection is None and self._steps_are_known(adapter):
            self.settle()
            adapter.start(self.model)
        elif adapter.selection is not None:
            adapter.selection.check_model()

    def _follow(self, adapter: Adapter) -> None:
        """Knows the Trainer's attempt that this forward belongs to, and undoes one that has failed."""
        if adapter.attempt is None:
            if adapter.selection is not None:
                return  # a loop of the user's: nothing to look for at each forward
            trainer = calling_trainer()
        elif adapter.attempt.running:
            return
        else:
            trainer = calling_trainer()
            if adapter.attempt.failed:
                self._go_back(adapter, adapter.attempt)
        adapter.attempt = None
        if planned_steps(trainer) is not None:
            adapter.attempt = Attempt(trainer, adapter, self.whole_of(adapter), self._copies(adapter))
            if adapter.config.clip_scope == "all":
                clip_in(trainer, self)

    def _go_back(self, adapter: Adapter, attempt: Attempt) -> None:
        adapter.withdraw(self._whole, self._tensors())
        adapter.load(attempt.slots)
        adapter.whole = dict(attempt.whole)
        adapter.write(self._tensors())
        attempt.undo(self._copies(adapter))
        if adapter.asked:
            adapter.config.total_steps = None

    def _copies(self, adapter: Adapter) -> dict[str, Tensor]:
        return saved_whole(self.model, next(name for name, each in self.adapters.items() if each is adapter))

    def _steps_are_known(self, adapter: Adapter) -> bool:
        if adapter.config.needs_total_steps:
            adapter.config.total_steps, adapter.asked = planned_steps(calling_trainer()), True
        if adapter.config.needs_total_steps and self.model.training:
            raise not_known(next(name for name, each in self.adapters.items() if each is adapter))
        return not adapter.config.needs_total_steps

    def _train(self, adapter: Adapter, trainable: bool) -> None:
        if not trainable and (self._pause is None or self._pause.adapter is not adapter):
            adapter.stop()
        adapter.values.requires_grad_(trainable)
        adapter.expect(trainable and adapter.selection is None and adapter is self.active)

    def _exchange(self, old: Adapter | None, new: Adapter | None) -> None:
        if old is new:
            if new is not None and not new.written:
                new.write(self._tensors())
            return
        if old is not None and old.written:
            if old.selection is not None and new is not None and self._pause is None:
                self._pause = Pause(old, self._whole, self._tensors())
            else:
                old.withdraw(self._whole, self._tensors())
        if self._pause is not None and self._pause.adapter is new:
            self._pause.end()
            self._pause = None
        elif new is not None:
            new.write(self._tensors())

    def settle(self) -> None:
        """Ends the training of an adapter that is not active but could have gone on; its state is kept."""
        if self._pause is None:
            return
        active, paused = self.active, self._pause.adapter
        written = active is not None and active.written
        if active is not None and written:
            active.withdraw(self._whole, self._tensors())
        self._pause.end()
        self._pause = None
        paused.withdraw(self._whole, self._tensors())
        if active is not None and written:
            active.write(self._tensors())

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, has no training that waits."""
        self.settle()
        return dict(vars(self))

    # The base.

    @property
    def base_of_whole(self) -> dict[str, Tensor]:
        """The base's version of all that an adapter may set whole."""
        return self._whole

    def load(self, name: str, delta: SparseDelta, progress: Progress | None = None) -> None:
        """Replaces what an adapter holds."""
        self.settle()
        adapter = self.adapters[name]
        with self.base_restored():
            slots = adapter.slots_of(delta, progress)  # what does not fit is refused before anything changes
        adapter.stop()
        written = adapter.written and not self._disable_adapters
        if written:
            adapter.withdraw(self._whole, self._tensors())
        adapter.load(slots)
        adapter.whole, adapter.attempt = dict(delta.whole), None
        if written:
            adapter.write(self._tensors())
            self._train(adapter, adapter.values.requires_grad)

    def _tensors(self) -> dict[str, Tensor]:
        with torch._C.DisableTorchFunctionSubclass():
            return {name: tensor.detach() for name, tensor in Base(self.model).tensors.items()}

    @contextlib.contextmanager
    def base_restored(self) -> Any:
        """The base's tensors hold the base inside."""
        if self.active is None or self._disable_adapters or not self.active.written:
            yield
            return
        with self.active.absent(self._whole, self._tensors()):
            yield

    def whole_of(self, adapter: Adapter) -> dict[str, Tensor]:
        """The tensors that a saved adapter brings whole, by name: buffers it changed, and what the checkpoint lacks.

        Without the adapter's own entries, which lie over them.
        """
        if adapter is not self.active:
            self.settle()
        tensors = self._tensors()
        if adapter is self.active and adapter.written and not self._disable_adapters:
            whole = {name: tensors[name] for name in sorted({*self.new, *changed(self._whole, tensors)})}
        else:
            whole = {n: adapter.whole.get(n, self._whole[n]) for n in sorted({*self.new, *adapter.whole})}
        return {name: adapter.initial(name, tensor) for name, tensor in whole.items()}

    def fingerprint(self, without: Any) -> str:
        """The base's fingerprint, over all of its tensors but those named. Hashed once, until the base is converted."""
        if self._digests is None:
            with self.base_restored():
                self._digests = {name: digest(tensor) for name, tensor in self._tensors().items()}
        return fingerprint({name: value for name, value in self._digests.items() if name not in without})

    def describe(self, name: str) -> str:
        """What an adapter holds now, in a line; see `unmask.peft.status`."""
        adapter = self.adapters[name]
        dense = sum(tensor.numel() for tensor in saved_whole(self.model, name).values())
        steps = "" if adapter.config.total_steps is None else f" of {adapter.config.total_steps:,}"
        return (
            f"{name} ({adapter.config.method}): {adapter.used:,} weights selected of a budget of {adapter.budget:,}, step "
            f"{adapter.step:,}{steps}; {dense:,} numbers trained whole in modules_to_save"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SelectiveLayer:
        """As any module's, for devices; ``values`` keep their dtype, being masters of whatever the tensors hold."""
        self.settle()
        stay_unwrapped(self)  # a Trainer that is being built moves its model
        held = {name: (p.device, p.dtype, p.detach()) for name, p in self.unmask_values.items()}
        settled = [adapter for adapter in self.adapters.values() if not adapter.pending]
        super()._apply(fn, recurse)
        self._digests = None
        for name, (device, dtype, values) in held.items():
            parameter = self.unmask_values[name]
            if parameter.dtype != dtype:
                parameter.data = values.to(parameter.device)
            if self.adapters[name] in settled:
                self.adapters[name].converted()
            if parameter.device != device:
                self.adapters[name].move()
        return self
