"""Tells what a base checkpoint holds of a model, what it lacks, and what a PEFT library added to the model.

Tensors that the base lacks (a new head, a LoRA's matrices, bottleneck adapters) mostly start at random: a delta must hold every
value of them. PEFT libraries are known by their modules' own attributes (peft's ``adapter_layer_names``, ``get_adapter`` of
`adapters`); neither is imported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from unmask.delta.weight_files import cached_weights, stored_names
from unmask.errors import SelectionError
from unmask.gradients.wrappers import bare, named_parameters, persistent_buffers, plain_names
from unmask.quantised.layers import weights
from unmask.reading import refusing

_WRAPPED = frozenset({"base_layer", "original_module"})  # where peft keeps the module that it wraps


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns what a fingerprint covers: parameters (shared ones once) and persistent buffers, detached, by name.

    The names are those of the plain model, without those that a wrapper adds (`unmask.gradients.wrappers`). A quantised
    weight is a `QuantisedTensor`, which does not change its layer until `unmask.quantised.layers.settle` is called.
    """
    named = weights(model) | persistent_buffers(model)
    with torch._C.DisableTorchFunctionSubclass():
        return {name: tensor.detach() for name, tensor in named.items()}


def name_or_path(model: nn.Module) -> str | None:
    """Returns the id or folder that a transformers model was loaded from; None if the model does not say."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None) or None


def added_tensors(model: nn.Module) -> set[str]:
    """Returns the names of the parameters and persistent buffers that peft or `adapters` put into a model or its modules.

    Example:
        >>> added_tensors(nn.Linear(2, 2))
        set()
    """
    model = bare(model)
    plain, prefixes, inserted = plain_names(model), [], set()
    for place, module in model.named_modules():
        layers = getattr(module, "adapter_layer_names", None)
        if isinstance(layers, tuple):  # a layer of peft
            parts = (*layers, *getattr(module, "other_param_names", ()))
            prefixes += [plain(f"{place}.{part}.".removeprefix(".")) for part in parts]
        adapters = getattr(getattr(module, "adapters_config", None), "adapters", None)
        # a module of `adapters`, which gives a module, nested dictionaries of modules, or None
        if adapters is not None and hasattr(module, "get_adapter"):
            found = tree_leaves([module.get_adapter(name) for name in adapters])  # type: ignore[operator]
            inserted |= {id(p) for leaf in found if isinstance(leaf, nn.Module) for p in leaf.parameters()}
    by_id = {name for name, p in named_parameters(model).items() if id(p) in inserted}
    return {name for name in base_tensors(model) if f"{name}.".startswith(tuple(prefixes))} | by_id


def checkpoint_name(name: str) -> str:
    """Returns a tensor's name before peft wrapped the module that holds it.

    Example:
        >>> checkpoint_name("base_model.model.bert.pooler.dense.base_layer.weight")
        'bert.pooler.dense.weight'
    """
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in _WRAPPED)


def missing_from_checkpoint(model: nn.Module) -> set[str]:
    """Returns the names of parameters and buffers that a transformers model's safetensors checkpoint lacks, such as a new head.

    The set is empty where this cannot be found out: there is no such checkpoint, or its names differ throughout from the
    model's (a converted layout). Name such tensors with ``unmask.select(..., new=...)``. For a module that holds transformers
    models, the set has the tensors that these lack. Tensors that a PEFT library added are left out: see `added_tensors`.
    """
    model = bare(model)
    source = name_or_path(model)
    if not source:
        plain = plain_names(model)
        found: dict[str, nn.Module] = {}  # by place, the transformers models that a LightningModule, say, holds
        for place, module in model.named_modules():
            inner = bare(module)
            outermost = not any(f"{plain(place)}.".startswith(f"{outer}.") for outer in found)
            if outermost and hasattr(inner, "base_model_prefix") and name_or_path(inner):
                found[plain(place)] = inner
        return {f"{place}.{name}" for place, part in found.items() for name in missing_from_checkpoint(part)}
    weights_file = cached_weights(source)
    if weights_file is None:
        return set()
    with refusing(SelectionError, f"the base's checkpoint {str(weights_file)!r}", "Take another copy of the base."):
        stored = stored_names(weights_file)
    if not stored:
        return set()
    prefix = str(getattr(model, "base_model_prefix", "") or "") + "."
    added = added_tensors(model)
    tensors = {name: tensor for name, tensor in base_tensors(model).items() if name not in added}
    stored_as = {name: checkpoint_name(name) for name in tensors}
    missing = {name for name, s in stored_as.items() if stored.isdisjoint({s, s.removeprefix(prefix), prefix + s})}
    share = sum(tensors[name].numel() for name in missing) / max(1, sum(t.numel() for t in tensors.values()))
    return missing if share < 0.5 else set()
