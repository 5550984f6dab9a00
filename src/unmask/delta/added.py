"""What a PEFT library added to a base model: a LoRA's matrices, bottleneck adapters, a trained copy of the head.

Such tensors are in no base checkpoint, and most start at random: a delta must hold every value of theirs. The libraries
are known by their modules' own attributes (peft's ``adapter_layer_names``, ``get_adapter`` of `adapters`); neither is
imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from torch import nn

from unmask.delta.delta import base_tensors
from unmask.errors import MethodError
from unmask.gradients.wrappers import bare, named_parameters, plain_names

_WRAPPED = frozenset({"base_layer", "original_module"})  # where peft keeps the module that it wraps


def added_tensors(model: nn.Module) -> set[str]:
    """Names of the parameters and persistent buffers that peft or `adapters` put into a model.

    Args:
        model: A ``PeftModel``, a model after ``adapters.init``, a module that holds one, or any other (which has none).

    Example:
        >>> added_tensors(nn.Linear(2, 2))
        set()
    """
    model = bare(model)
    names = base_tensors(model)
    prefixes = tuple(_peft_prefixes(model))
    inserted = {id(p) for module in _adapter_modules(model) for p in module.parameters()}
    by_id = {name for name, p in named_parameters(model).items() if id(p) in inserted}
    return {name for name in names if f"{name}.".startswith(prefixes)} | by_id


def checkpoint_name(name: str) -> str:
    """A tensor's name before peft wrapped the module that holds it.

    Example:
        >>> checkpoint_name("base_model.model.bert.pooler.dense.base_layer.weight")
        'bert.pooler.dense.weight'
    """
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in _WRAPPED)


def refuse_pruned_base(pruned: list[str], new: Set[str]) -> None:
    """Refuses to prune tensors of the base checkpoint: the delta holds only their trained entries.

    Args:
        pruned: Names of the tensors whose unselected weights shall be zero.
        new: Names of the tensors that the base checkpoint lacks.

    Raises:
        MethodError: One of the first is none of the second.
    """
    base = [name for name in pruned if name not in new]
    if base:
        raise MethodError(
            f"{base[0]!r} is a tensor of the base model, and this method prunes what it does not select to zero, which a delta "
            "to that base cannot hold. Select inside added modules only (include='lora_' for a peft LoRA), or name tensors "
            "that the base checkpoint lacks with new=."
        )


def refuse_dead_lora(model: nn.Module, trained: Set[str]) -> None:
    """Refuses a fixed selection that trains nothing but A of LoRAs whose B is zero: no gradient ever reaches A.

    Args:
        model: Any module.
        trained: Names of the tensors that the selection trains, in part or whole.

    Raises:
        MethodError: It is such a selection.
    """
    names = {id(p): name for name, p in named_parameters(model).items()}
    dead = set()
    for a, b in _lora_pairs(model):
        if names.get(id(b)) not in trained and not b.detach().any():
            dead.add(names.get(id(a)))
    if trained and trained <= dead:
        raise MethodError(
            "the selection holds entries of LoRA's A alone, while B starts at zero and stays there, so that nothing can ever be "
            "learnt. Take allocation='tensor' (method.but(...)), which spreads the budget over A and B, or a larger budget."
        )


def _peft_prefixes(model: nn.Module) -> Iterator[str]:
    plain = plain_names(model)
    for place, module in model.named_modules():
        layers = getattr(module, "adapter_layer_names", None)
        if isinstance(layers, tuple):
            for part in (*layers, *getattr(module, "other_param_names", ())):
                yield plain(f"{place}.{part}.".removeprefix("."))


def _adapter_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of the `adapters` library, from its own nested listing by layer and place."""
    for module in model.modules():
        adapters = getattr(getattr(module, "adapters_config", None), "adapters", None)
        if adapters is None or not hasattr(module, "get_adapter"):
            continue
        for name in adapters:
            yield from _leaves(module.get_adapter(name))  # type: ignore[operator]


def _leaves(value: Any) -> Iterator[nn.Module]:
    """Modules in a nest of dictionaries; a model's listing is one, a layer's is a module or None."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)


def _lora_pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    for module in model.modules():
        down, up = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(down, nn.ModuleDict) and isinstance(up, nn.ModuleDict):
            for key in down.keys() & up.keys():
                yield down[key].weight, up[key].weight  # type: ignore[misc]
