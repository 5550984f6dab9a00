"""Implements PEFT's tuner for deltas of single weights, `SelectiveModel`."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import Tensor, nn
from transformers.utils.hub import PushToHubMixin

from peft import PeftConfig, PeftModel
from unmask.delta.base import name_or_path
from unmask.delta.delta import SparseDelta, refuse_diverged
from unmask.delta.live import has_selection
from unmask.delta.provenance import provenance_of
from unmask.delta.record import record_delta
from unmask.delta.rules import Majority
from unmask.errors import DeltaError, MethodError
from unmask.gradients.unreached import unwatch_forwards
from unmask.gradients.wrappers import named_parameters
from unmask.integrations.support import calling, running_trainer
from unmask.methods.budget import Budget
from unmask.peft.adapter import Adapter
from unmask.peft.card import complete_card
from unmask.peft.combine import Combination, combine_whole, combined_adapter, refuse_combination, rule_of
from unmask.peft.config import PREFIX
from unmask.peft.layer import SelectiveLayer
from unmask.peft.saving import is_entry, put_entries, take_entries
from unmask.peft.targets import Base, eligible, saved_whole
from unmask.peft.training import before_forward
from unmask.selection.eligible import count_budget


class SelectiveModel(BaseTuner):
    """The tuner in which `peft.get_peft_model` wraps a base for a `SelectiveConfig`.

    The base's modules stay as they are, except for those in ``modules_to_save``. Its tensors hold the active adapter's values.

    Attributes:
        model: The base.
        deltas: The adapters.
    """

    prefix = PREFIX
    tuner_layer_cls = SelectiveLayer
    target_module_mapping: dict = {}  # noqa: RUF012  # PEFT expects the attribute; it stays empty
    uses_shared_state = True

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(peft_config, PeftConfig):  # no PeftModel made it; PEFT 0.20 does not check uses_shared_state
            raise ValueError("selective adapters share state outside the base model; use peft.get_peft_model instead.")
        hooks = model._forward_pre_hooks.values()
        if has_selection(model) or any(isinstance(getattr(hook, "__self__", None), SelectiveModel) for hook in hooks):
            raise MethodError(
                "this base model has a selection or selective adapters already. To add an adapter: "
                "peft_model.add_adapter(name, config); to start again: base = peft_model.unload(), or selection.release()."
            )
        try:
            super().__init__(model, peft_config, *args, **kwargs)
        except Exception:
            if "deltas" in self.__dict__.get("_modules", {}):
                self._end(keep=False)
            raise
        owner = calling(PeftModel)  # it is being built, and calls these methods by name
        for name in ("print_trainable_parameters", "_upload_modified_files", "_ddp_params_and_buffers_to_ignore"):
            setattr(owner, name, getattr(self, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base with its hooks; PEFT 0.20 would call the base's ``forward`` without them."""
        return self.model(*args, **kwargs)

    # Methods of PeftModel that this tuner replaces.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns the counts (trainable, all) of numbers in parameters, as PEFT counts them."""
        return PeftModel.get_nb_trainable_parameters(cast(PeftModel, self))

    def print_trainable_parameters(self) -> None:
        """Prints PEFT's line, and then one line about the active adapter; see `unmask.peft.status`."""
        PeftModel.print_trainable_parameters(cast(PeftModel, self))
        for name in self.deltas.active_adapters:
            print(self.deltas.describe(name))

    def _upload_modified_files(self, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        """Ends ``push_to_hub``: completes the model card, with which transformers has replaced the saved one."""
        complete_card(working_dir)
        return PushToHubMixin._upload_modified_files(cast(PeftModel, self), working_dir, *args, **kwargs)

    # Adding and choosing adapters.

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.deltas = SelectiveLayer(model)
        self._ddp_params_and_buffers_to_ignore: list[str] = []
        self._hook = model.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        before_forward(self.deltas)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds the adapter of ``self.peft_config[adapter_name]``; the adapter sets no weight yet."""
        config: Any = self.peft_config[adapter_name]  # a SelectiveConfig
        twin = next((a for a in self.deltas.adapters.values() if a.config is config), None)
        if twin is not None:  # each adapter records what it holds in its config
            config = self.peft_config[adapter_name] = copy.copy(config)
        total = sum(parameter.numel() for parameter in Base(model).parameters.values())
        budget = None if config.budget is None else Budget.parse(config.budget).of(total)
        method = config.build(budget)
        parameters = eligible(model, config, method)
        names = {id(p): name for name, p in named_parameters(model).items()}
        method.schedule.check(count := count_budget(model, method, [names[id(p)] for p in parameters.values()]))
        adapter = Adapter(config, count, parameters)
        if twin is not None and adapter_name == "ref" and running_trainer() is not None:
            # TRL makes a reference adapter and copies the parameters one by one, which would not copy the positions.
            adapter.load(twin.slots())
            adapter.whole = self.deltas.whole_of(twin)
        self._add(adapter_name, adapter)

    def _add(self, name: str, adapter: Adapter) -> None:
        config = adapter.config
        self.deltas.adapters[name] = adapter
        self.deltas.unmask_values[name] = adapter.values
        self._ddp_params_and_buffers_to_ignore.append(f"base_model.deltas.unmask_values.{name}")
        self.targeted_module_names = sorted(
            {n.rpartition(".")[0] for a in self.deltas.adapters.values() for n in a.layout.names}
        )
        active = name in self.active_adapters
        if active:
            self.deltas.set_adapter(name, inference_mode=config.inference_mode)
        set_additional_trainable_modules(
            model=self.model,
            peft_config=config,
            model_config=BaseTuner.get_model_config(self),
            adapter_name=name,
            activate_adapter=active,
        )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter active; see `SelectiveLayer.set_adapter`."""
        self.deltas.set_adapter(adapter_name, inference_mode=inference_mode)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; if it was active, the base's weights come back and another adapter becomes active.

        Raises:
            ValueError: There is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        was_active = adapter_name in self.deltas.active_adapters
        self.deltas.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        active = list(self.deltas.active_adapters)
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, new_active_adapters=active)
        self.active_adapter = active
        if was_active and active:
            super().set_adapter(active[0])  # PEFT skips the wrappers that the deleted adapter was not in
            self.active_adapter = active

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Makes adapters trainable, or freezes them."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.deltas.set_requires_grad(adapter_names, requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.deltas.enable_adapters(enabled)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no module of the base is replaced")

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Combination = "linear",
        *,
        density: float | None = None,
        majority_sign_method: Majority = "total",
        seed: int = 0,
    ) -> None:
        """Adds an adapter that combines others, at every weight that one of them sets.

        The types are PEFT's, and `unmask.combine` defines them: ``"linear"`` is base + sum of w_i (adapter_i - base). The new
        adapter's budget is the number of weights that it sets, so it selects no further ones. Tensors that the adapters set
        whole (``modules_to_save``) are combined as by ``"linear"`` under every type.

        Args:
            adapters: The names of the adapters.
            weights: A factor for each.
            adapter_name: The new adapter's name.
            combination_type: ``"linear"``, ``"magnitude_prune"``, ``"ties"``, ``"dare_linear"`` or ``"dare_ties"``.
            density: The share of each adapter's weights that is kept, for all types but ``"linear"``.
            majority_sign_method: How a sign is elected, ``"total"`` or ``"frequency"``.
            seed: The seed of DARE.

        Raises:
            ValueError: A name is unknown, missing or taken, or there is no such combination.
        """
        rule = rule_of(combination_type, density, majority_sign_method, seed)
        refuse_combination(adapters, weights, adapter_name, sorted(self.peft_config))
        parts = [self.deltas.adapters[name] for name in adapters]
        combined = combined_adapter(parts, weights, rule)
        self.peft_config[adapter_name] = combined.config
        whole = [self.deltas.whole_of(part) for part in parts]
        combined.whole = combine_whole(whole, weights, self.deltas.base_of_whole)
        self._add(adapter_name, combined)
        saved = combine_whole([saved_whole(self.model, name) for name in adapters], weights, self.deltas.tensors())
        with torch.no_grad():
            for name, tensor in saved_whole(self.model, adapter_name).items():
                tensor.copy_(saved[name])

    # Unloading.

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Returns the base as an ordinary model with the active adapter's values; it computes the same bits as before.

        Args:
            progressbar: It has no effect: the values are in place already.
            safe_merge: True refuses values that are not finite.
            adapter_names: One adapter, which is made active first; None takes the active one.

        Raises:
            ValueError: Several adapters are named, or values are not finite.
        """
        if adapter_names:
            self.set_adapter(adapter_names)
        active = self.deltas.active
        if safe_merge and active is not None and not torch.isfinite(active.slots().values).all():
            raise ValueError("the adapter holds NaN or infinite values; nothing was merged.")
        self._end(keep=True)
        return super().merge_and_unload(adapter_names=adapter_names)  # PEFT puts modules_to_save in place

    @torch.no_grad()
    def unload(self) -> nn.Module:
        """Returns the base as it was before `get_peft_model`, bit for bit."""
        self._end(keep=False)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.original_module)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def _end(self, keep: bool) -> None:
        self.deltas.end(keep=keep)
        self._hook.remove()
        unwatch_forwards(self.model)  # if the model is a copy, it has inherited the hooks of a selection

    def _check_merge_allowed(self) -> None:
        """Allows every merge: tied weights are one tensor, and stay tied."""

    # Saving and loading.

    def delta(self, adapter_name: str, modules_to_save: bool = True) -> SparseDelta:
        """Returns an adapter as an `unmask.SparseDelta` of the base; see `unmask.peft.delta`."""
        adapter = self.deltas.adapters[adapter_name]
        saved = {name: tensor.detach().cpu().clone() for name, tensor in saved_whole(self.model, adapter_name).items()}
        whole = {name: t.cpu() for name, t in self.deltas.whole_of(adapter).items() if name not in saved}
        refuse_diverged(saved | {name: t for name, t in whole.items() if name not in self.deltas.new})
        base = self.deltas.fingerprint({*whole, *saved})
        adapter.catch_up()
        slots = adapter.slots()
        provenance = provenance_of(
            self.model,
            adapter.config.build(adapter.budget),
            adapter.layout,
            budget=adapter.budget,
            used=slots.used,
            step=slots.step,
            dense=sorted(saved),
            base_id=adapter.config.base_model_name_or_path or name_or_path(self.model),
            parameters=sum(p.numel() for p in Base(self.model).parameters.values()),
        )
        stored = whole | (saved if modules_to_save else {})
        delta = record_delta(adapter.layout, slots, stored, base, provenance)
        adapter.config.record = {
            **delta.metadata,
            "fingerprint": base,
            "whole": sum(tensor.numel() for tensor in (whole | saved).values()),
        }
        return delta

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, adapter in self.deltas.adapters.items():
            put_entries(self.delta(name, modules_to_save=False), adapter.progress(), name, prefix, destination)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in self.deltas.adapters:
            saved = take_entries(name, prefix, state_dict)
            if saved is None:
                continue
            delta, progress = saved
            mine = self.deltas.fingerprint({*delta.whole, *saved_whole(self.model, name)})
            if mine != delta.base:
                raise DeltaError(
                    f"this model is not the base of adapter {name!r}: its fingerprint is {mine[:23]}..., the adapter was made on "
                    f"{delta.metadata.get('base_id') or 'another base'!r} with {delta.base[:23]}... Its values were not loaded. "
                    "Load that base, unmodified, in the same dtype and with the same modules_to_save."
                )
            delta.check_places(Base(self.model).tensors)
            self.deltas.load(name, delta, progress)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], unwanted_adapter_names: Any
    ) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in state_dict.items() if is_entry(key, adapter_name)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {f"{key}.{adapter_name}" if is_entry(key, None) else key: tensor for key, tensor in state_dict.items()}


def tuner_of(model: PeftModel | SelectiveModel) -> SelectiveModel:
    """Returns the `SelectiveModel` inside a PEFT model, and refuses a model with another kind of adapter."""
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, SelectiveModel):
        raise MethodError(
            f"this PEFT model holds a {type(tuner).__name__}, and no adapter that was made with SelectiveConfig."
        )
    return tuner
