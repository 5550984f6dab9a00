"""Holds all adapters of one base, and keeps the active adapter's values in the base's tensors.

PEFT's methods replace each module that they adapt with a layer. Here one layer stands for the whole base and replaces no
module: the base's own tensors hold the active adapter's values. One adapter is active at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from unmask.delta.base import missing_from_checkpoint
from unmask.delta.delta import SparseDelta
from unmask.delta.fingerprint import digest, fingerprint
from unmask.delta.record import before_training
from unmask.errors import SelectionError
from unmask.integrations.support import keep_unwrapped, running_trainer
from unmask.peft.adapter import Adapter, changed
from unmask.peft.saving import Progress, slots_of
from unmask.peft.targets import Base, saved_whole


class Values(nn.ParameterDict):
    """Shows every adapter's ``values`` to optimizers. A state dict holds the deltas instead; see `unmask.peft.saving`."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter. It bypasses accelerate's ``init_empty_weights`` (``low_cpu_mem_usage``), which drops data."""
        self._parameters[name] = param

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class SelectiveLayer(nn.Module, BaseTunerLayer):
    """The adapters of one base model.

    Attributes:
        model: The base.
        adapters: The adapters by name.
        new: The names of the base's tensors that its checkpoint lacks; a saved adapter contains them.
        base_of_whole: The base's version of all tensors that an adapter may set whole: buffers, and those named in ``new``.
    """

    model: nn.Module
    adapter_layer_names = ("unmask_values",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)  # not as a submodule, because it is one of the tuner already
        self.adapters: dict[str, Adapter] = {}
        self.unmask_values = Values()
        self._active_adapter = []
        base = Base(model)
        self.new = sorted(missing_from_checkpoint(model) & base.tensors.keys())
        self.base_of_whole = {name: base.tensors[name].detach().clone() for name in (*base.buffers, *self.new)}
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._disabled = contextlib.ExitStack()  # keeps the base's values in the tensors while adapters are disabled
        self._left: Adapter | None = None  # the adapter that was active when adapters were disabled
        self._pause = contextlib.ExitStack()  # keeps `_paused` out of the tensors
        self._paused: Adapter | None = None  # an adapter that goes on training when it is made active again
        self._digests: dict[str, str] | None = None
        model.requires_grad_(False)

    @property
    def active(self) -> Adapter | None:
        """The active adapter; None if there is none."""
        names = [name for name in self.active_adapters if name in self.adapters]
        return self.adapters[names[0]] if names else None

    # PEFT's verbs.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter active: its values go into the tensors, and another's are taken out. Several are refused."""
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
        """Puts the active adapter's values back into the tensors, or takes them out; its training goes on afterwards."""
        if enabled != self._disable_adapters:
            return
        self._disable_adapters = not enabled
        if not enabled:
            self._left = self.active
            if self._left is not None and self._left.written:
                self._disabled.enter_context(self._left.absent(self.base_of_whole, self.tensors()))
        else:
            self._disabled.close()
            self._exchange(self._left, self.active)  # another may have been made active in between
            self._left = None

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; if it was active, the base's weights come back and the next adapter becomes active."""
        if self._disable_adapters:
            raise SelectionError("delete_adapter() was called inside disable_adapter(); leave that context first.")
        self.settle()
        if adapter_name in self.active_adapters:
            self._exchange(self.active, None)
        self.adapters[adapter_name].expect(False)
        super().delete_adapter(adapter_name)  # chooses the next one
        del self.adapters[adapter_name]

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Makes adapters trainable, or freezes them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.adapters:
                self._train(self.adapters[name], requires_grad)

    def get_base_layer(self) -> nn.Module:
        """The base."""
        return self.model

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: the active adapter's values are in the weights already."""

    def unmerge(self) -> None:
        """Does nothing; see `merge`."""

    def end(self, keep: bool) -> None:
        """Makes the base an ordinary model again, with the active adapter's values if ``keep``, else with its own."""
        active = self.active
        if self._disable_adapters:
            self.enable_adapters(True)
        self.settle()
        for adapter in self.adapters.values():
            adapter.expect(False)
        if active is not None and not keep:
            active.withdraw(self.base_of_whole, self.tensors())
        elif active is not None:
            active.stop()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    # Which adapter is in the tensors.

    def name_of(self, adapter: Adapter) -> str:
        """Returns an adapter's name."""
        return next(name for name, each in self.adapters.items() if each is adapter)

    def _train(self, adapter: Adapter, trainable: bool) -> None:
        if not trainable and adapter is not self._paused:
            adapter.stop()
        adapter.values.requires_grad_(trainable)
        adapter.expect(trainable and adapter.selection is None and adapter is self.active)

    def _exchange(self, old: Adapter | None, new: Adapter | None) -> None:
        if old is new:
            if new is not None and not new.written:
                new.write(self.tensors())
            return
        if old is not None and old.written:
            if old.selection is not None and new is not None and self._paused is None:
                self._pause.enter_context(old.paused(self.base_of_whole, self.tensors()))
                self._paused = old
            else:
                old.withdraw(self.base_of_whole, self.tensors())
        if new is not None and new is self._paused:
            self._pause.close()
            self._paused = None
        elif new is not None:
            new.write(self.tensors())

    def settle(self) -> None:
        """Ends the training of an adapter that was paused while another became active; the adapter keeps its state."""
        paused, active = self._paused, self.active
        if paused is None:
            return
        written = active is not None and active.written
        if active is not None and written:
            active.withdraw(self.base_of_whole, self.tensors())
        self._pause.close()
        self._paused = None
        paused.withdraw(self.base_of_whole, self.tensors())
        if active is not None and written:
            active.write(self.tensors())

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state of a copy or a pickle, in which no adapter is paused."""
        self.settle()
        return dict(vars(self))

    # The base.

    def load(self, name: str, delta: SparseDelta, progress: Progress | None = None) -> None:
        """Replaces the weights that an adapter holds by those of a delta. One that does not fit changes nothing."""
        self.settle()
        adapter = self.adapters[name]
        with self.base_restored():
            slots = slots_of(delta, progress, adapter.ledger)
        adapter.stop()
        written = adapter.written and not self._disable_adapters
        if written:
            adapter.withdraw(self.base_of_whole, self.tensors())
        adapter.load(slots)
        adapter.whole, adapter.attempt = dict(delta.whole), None
        if written:
            adapter.write(self.tensors())
            self._train(adapter, adapter.values.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the base's tensors by name, detached, with what they hold now."""
        with torch._C.DisableTorchFunctionSubclass():
            return {name: tensor.detach() for name, tensor in Base(self.model).tensors.items()}

    def base_restored(self) -> contextlib.AbstractContextManager[None]:
        """Puts the base's values into its tensors for the time of the context."""
        if self.active is None or self._disable_adapters or not self.active.written:
            return contextlib.nullcontext()
        return self.active.absent(self.base_of_whole, self.tensors())

    def whole_of(self, adapter: Adapter) -> dict[str, Tensor]:
        """Returns the tensors that a saved adapter contains whole, by name: buffers it changed, and what the checkpoint lacks.

        The adapter's single weights are not in them; they are applied over these tensors.
        """
        if adapter is not self.active:
            self.settle()
        tensors = self.tensors()
        if adapter is self.active and adapter.written and not self._disable_adapters:
            whole = {name: tensors[name] for name in sorted({*self.new, *changed(self.base_of_whole, tensors)})}
        else:
            whole = {n: adapter.whole.get(n, self.base_of_whole[n]) for n in sorted({*self.new, *adapter.whole})}
        return {n: t.clone() for n, t in whole.items()} | before_training(adapter.layout, adapter.slots(), whole)

    def fingerprint(self, without: Container[str]) -> str:
        """Returns the base's fingerprint over all tensors but those named; they are hashed once until it is moved or cast."""
        if self._digests is None:
            with self.base_restored():
                self._digests = {name: digest(tensor) for name, tensor in self.tensors().items()}
        return fingerprint({name: value for name, value in self._digests.items() if name not in without})

    def describe(self, name: str) -> str:
        """Describes an adapter in one line; see `unmask.peft.status`."""
        adapter = self.adapters[name]
        dense = sum(tensor.numel() for tensor in saved_whole(self.model, name).values())
        steps = "" if adapter.config.total_steps is None else f" of {adapter.config.total_steps:,}"
        return (
            f"{name} ({adapter.config.method}): {adapter.used:,} weights selected of a budget of {adapter.budget:,}, step "
            f"{adapter.step:,}{steps}; {dense:,} numbers trained whole in modules_to_save"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SelectiveLayer:
        """Moves the layer to a device. ``values`` keep their dtype: they are the master copies of what the tensors hold."""
        self.settle()
        trainer = running_trainer()  # a Trainer moves its model when it is built
        frozen = not any(p.requires_grad for p in self.model.parameters())
        if trainer is not None and frozen and trainer.accelerator.distributed_type.value.startswith("MULTI_"):
            keep_unwrapped(trainer)
        held = {name: (p.device, p.dtype, p.detach()) for name, p in self.unmask_values.items()}
        settled = [adapter for adapter in self.adapters.values() if not adapter.live.writes.new]
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
