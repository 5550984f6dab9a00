"""Looks at where a model's weights lie in memory: refuses absent and overlapping ones, and makes tied ones one parameter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unmask.errors import MethodError
from unmask.gradients.wrappers import has_memory, memory_of, named_parameters, persistent_buffers
from unmask.quantised.layers import weights


def refuse_absent(model: nn.Module) -> None:
    """Raises a `MethodError` if a tensor has no shape yet, is on the meta device, or was made in inference mode."""
    for name, tensor in (named_parameters(model) | persistent_buffers(model)).items():
        if is_lazy(tensor):
            raise MethodError(f"{name!r} has no shape yet (a lazy module); run one forward before unmask.select().")
        if tensor.is_meta:
            raise MethodError(
                f"{name!r} is on the meta device: it holds no data. The model was made under torch.device('meta') or "
                "init_empty_weights(), or accelerate offloads this part of it to the CPU or to disk, from where it comes only "
                "while its layer runs. Load all of the model: from_pretrained without device_map and offload_folder, in a "
                "smaller dtype or quantised if memory is short (docs/quantised.md)."
            )
        if tensor.is_inference():
            raise MethodError(
                f"{name!r} was made under torch.inference_mode(), where nothing made can be trained; make the model outside "
                "of it, or under torch.no_grad()."
            )


@contextlib.contextmanager
def tied(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Makes parameters that share one memory one parameter, until the yielded function is called. An error undoes it too.

    Then autograd sums their gradients, and a budget counts them once. The first one, in the order of ``named_parameters()``,
    stands for all; afterwards the others have its memory.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    first: dict[tuple, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            memory = None if parameter is None else memory_of(parameter)
            if parameter is not None and memory is not None and first.setdefault(memory, parameter) is not parameter:
                replaced.append((module, name, parameter))
                setattr(module, name, first[memory])

    def undo() -> None:
        for module, name, parameter in replaced:
            standing = module._parameters.get(name)
            if standing is not None:
                with torch._C.DisableTorchFunctionSubclass():
                    parameter.data = standing.detach()
                setattr(module, name, parameter)
        replaced.clear()

    try:
        yield undo
    except BaseException:
        undo()
        raise


def refuse_overlaps(model: nn.Module, trained: Iterable[str]) -> None:
    """Raises a `MethodError` if entries of a trained tensor share memory with others, of the tensor or of another parameter.

    The model's ties are made one parameter already.
    """
    trained = set(trained)
    placed = {name: tensor for name, tensor in weights(model).items() if has_memory(tensor)}
    for name in trained & placed.keys():
        if any(size > 1 and not stride for size, stride in zip(placed[name].shape, placed[name].stride(), strict=True)):
            raise MethodError(
                f"{name!r} is expanded: several of its {placed[name].numel()} entries are one number in memory, and cannot be "
                "trained apart. Give it memory of its own first: parameter.data = parameter.data.clone()."
            )
    spans = sorted((_span(tensor), name) for name, tensor in placed.items())
    clusters: list[list[str]] = []
    end = 0
    for (low, high), name in spans:
        if low >= end:
            clusters.append([])
        clusters[-1].append(name)
        end = max(end, high)
    for cluster in clusters:
        _refuse_shared(cluster, placed, trained)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Returns the address of a tensor's first byte, and of the first byte after it."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _refuse_shared(cluster: list[str], placed: dict[str, Tensor], trained: set[str]) -> None:
    """Refuses tensors with nested addresses if they share an entry. Columns of one matrix do not, so every entry is checked."""
    tensors = [placed[name].detach() for name in cluster]
    if len(cluster) < 2 or not trained & set(cluster) or len({t.device for t in tensors}) > 1:
        return
    low, high = min(_span(t)[0] for t in tensors), max(_span(t)[1] for t in tensors)
    unit = math.gcd(*(t.element_size() for t in tensors), *(t.data_ptr() - low for t in tensors))  # bytes
    taken = torch.zeros((high - low) // unit, dtype=torch.int16)
    for number, (name, tensor) in enumerate(zip(cluster, tensors, strict=True), 1):
        size = tensor.element_size() // unit
        shape, stride = (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1)
        mine = taken.as_strided(shape, stride, (tensor.data_ptr() - low) // unit)
        other = int(mine.max())
        if other and trained & {name, cluster[other - 1]}:
            raise MethodError(
                f"{cluster[other - 1]!r} and {name!r} overlap in memory without being the same tensor, so that training one "
                "would change the other. Give one of them memory of its own (parameter.data = parameter.data.clone()), or "
                "tie them as a whole: one parameter in both places."
            )
        mine.fill_(number)
