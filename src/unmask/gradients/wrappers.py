"""Finds the plain model, or parts of it, inside wrappers such as `torch.compile`'s, and names its tensors without prefixes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unmask.errors import MethodError
from unmask.gradients.tapped import TappedParameter

# The attribute in which each wrapper keeps its module. The classes are recognised by name, so that no library is imported.
_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DeepSpeedEngine": "module",
    "_FabricModule": "_forward_module",
}
_LIBRARIES = ("torch", "deepspeed", "lightning", "lightning_fabric")
_REFUSED = {
    "DistributedDataParallel": (
        "is in DistributedDataParallel, which would wait for gradients that frozen weights never get; give unmask.select the "
        "plain model: a selection reduces its gradients itself (docs/distributed.md)"
    ),
    "FullyShardedDataParallel": (
        "is in FullyShardedDataParallel (FSDP1), which keeps weights in flat tensors without their shapes; shard it with "
        "torch.distributed.fsdp.fully_shard (FSDP2) instead"
    ),
    "DeepSpeedEngine": (
        "is in a DeepSpeed engine, which steps copies of the weights; use torchrun, accelerate or fully_shard without it"
    ),
}


def bare(model: nn.Module) -> nn.Module:
    """Returns the module inside the wrappers around it; a module without wrappers is returned as it is.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> bare(nn.DataParallel(model)) is model, bare(model) is model
        (True, True)
    """
    while (kind := _kind(model)) is not None:
        model = getattr(model, _INSIDE[kind])
    return model


def refuse_wrappers(model: nn.Module) -> None:
    """Refuses with a MethodError the wrappers, around a model or inside it, in which a selection cannot work."""
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind in _REFUSED:
            raise MethodError(f"{name or 'the model'} {_REFUSED[kind]}.")
        if kind == "DataParallel" and len(getattr(module, "device_ids", ())) > 1:
            raise MethodError(
                f"{name or 'the model'} is in DataParallel over {len(module.device_ids)} devices, which computes with copies "  # type: ignore[arg-type]
                "whose gradients no selection sees; start the script with torchrun instead (docs/distributed.md)."
            )


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """Returns a function that turns the names of a model's tensors and modules into those without wrappers.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model[0] = nn.DataParallel(model[0])
        >>> [plain_names(model)(name) for name, _ in model.named_parameters()]
        ['0.weight', '0.bias']
    """
    places = {
        f"{name}.{_INSIDE[kind]}".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if (kind := _kind(module)) is not None
    }
    if not places:
        return str

    def plain(name: str) -> str:
        parts = name.split(".")
        return ".".join(part for end, part in enumerate(parts, 1) if ".".join(parts[:end]) not in places)

    return plain


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns a model's parameters by plain name, each once. Parameters that share memory appear under the first name.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> model[1].weight.data = model[0].weight.data
        >>> list(named_parameters(nn.DataParallel(model)))
        ['0.weight']
    """
    model = bare(model)
    plain, seen, named = plain_names(model), set(), {}
    for name, parameter in model.named_parameters():
        memory = memory_of(parameter)
        if memory is None or memory not in seen:
            named[plain(name)] = parameter
        seen.add(memory)
    return named


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that a checkpoint holds, by plain name."""
    model = bare(model)
    plain, persistent = plain_names(model), set()
    for place, module in model.named_modules(remove_duplicate=False):
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        persistent |= {f"{place}.{name}".removeprefix(".") for name in kept}
    return {plain(name): buffer for name, buffer in model.named_buffers() if name in persistent}


def memory_of(tensor: Tensor) -> tuple | None:
    """Returns a key that two parameters share if they are the same view of the same memory.

    It is None for a tensor that is no parameter, is on the meta device, or has no memory (see `has_memory`).
    """
    with torch._C.DisableTorchFunctionSubclass():
        if not isinstance(tensor, nn.Parameter) or tensor.is_meta or not has_memory(tensor):
            return None
        return tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()


def has_memory(tensor: Tensor) -> bool:
    """Returns True if a tensor's entries lie in ordinary memory: not a shard, a quantisation library's tensor, or empty."""
    ordinary = type(tensor) in (Tensor, nn.Parameter, TappedParameter)
    return ordinary and tensor.layout == torch.strided and tensor.numel() > 0 and tensor.data_ptr() != 0


def _kind(module: nn.Module) -> str | None:
    for kind in type(module).__mro__:
        if kind.__name__ in _INSIDE and kind.__module__.split(".")[0] in _LIBRARIES:
            return kind.__name__
    return None
