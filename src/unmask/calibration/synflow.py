"""SynFlow in added modules: iterative, data-free pruning by synaptic flow (arXiv 2006.05467).

As in SparseAdapter's code, each added module is a network of its own: its weights' magnitudes, fed with ones, and R is the
sum of all outputs. So softmax, LayerNorm and the base's weights play no part. The non-linearity between a bottleneck's two
layers is the identity, which ReLU is on these positive inputs; dropout, a LoRA's scaling and the residual are left out.
The score of a weight is ``|w| dR/d|w|``, and the budget is reached in `ROUNDS` rounds of exponentially falling density,
each scored with what the last one left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from unmask.errors import MethodError
from unmask.ranking.ledger import Layout

ROUNDS = 100
Stage = nn.Linear | nn.Parameter  # a layer, or a vector that scales its outputs (DoRA's magnitude)
_Magnitude = Callable[[Tensor], Tensor]


def synaptic_flow(model: nn.Module, layout: Layout, budget: int) -> dict[int, Tensor]:
    """Scores whose ``budget`` best are what SynFlow keeps.

    Args:
        model: A model with LoRA layers of peft or bottleneck adapters.
        layout: The eligible tensors, all of such modules.
        budget: How many weights stay.

    Returns:
        By tensor index: float32 (float64 for a float64 tensor), of the tensor's shape; -1 for what was pruned before the
        last round.

    Raises:
        MethodError: An eligible tensor is no linear layer of a LoRA or a bottleneck adapter.
    """
    paths = list(_paths(model))
    _check_covered(paths, layout)
    weights = [layout.plain(index).double().abs() for index in range(len(layout.tensors))]
    alive = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    total = sum(weight.numel() for weight in weights)
    for k in range(1, ROUNDS + 1):
        scores = [
            score.masked_fill(~mask, -1.0)
            for score, mask in zip(_flow(paths, layout, weights, alive), alive, strict=True)
        ]
        if not any(score.any() for score in scores):
            break  # no flow at all, as through a LoRA whose B is zero: the caller refuses that
        if k < ROUNDS:
            keep = max(budget, round(total * (budget / total) ** (k / ROUNDS)))
            alive = _best(scores, keep)
    return {i: score.to(torch.promote_types(layout.tensors[i].dtype, torch.float32)) for i, score in enumerate(scores)}


def _flow(paths: list[list[Stage]], layout: Layout, weights: list[Tensor], alive: list[Tensor]) -> list[Tensor]:
    """``|w| dR/d|w|`` of the weights that are alive."""
    leaves = [(w * mask).requires_grad_() for w, mask in zip(weights, alive, strict=True)]
    by_id = {id(tensor): leaf for tensor, leaf in zip(layout.tensors, leaves, strict=True)}

    def magnitude(tensor: Tensor) -> Tensor:
        return by_id[id(tensor)] if id(tensor) in by_id else tensor.detach().double().abs()

    with torch.enable_grad():
        total = torch.stack([_through(path, magnitude).sum().cpu() for path in paths]).sum()
        gradients = torch.autograd.grad(total, leaves)
    return [leaf.detach() * gradient for leaf, gradient in zip(leaves, gradients, strict=True)]


def _through(path: list[Stage], magnitude: _Magnitude) -> Tensor:
    """(out,) what ones become on their way through a module."""
    first = path[0]
    assert isinstance(first, nn.Linear)
    x = first.weight.new_ones(first.in_features, dtype=torch.float64)
    for stage in path:
        if isinstance(stage, nn.Parameter):
            x = x * magnitude(stage).reshape(-1)
        else:
            x = magnitude(stage.weight) @ x
            if stage.bias is not None:
                x = x + magnitude(stage.bias)
    return x


def _best(scores: list[Tensor], keep: int) -> list[Tensor]:
    """Masks of the ``keep`` highest scores of all tensors together; ties fall to the first."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:keep]] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def _paths(model: nn.Module) -> Iterator[list[Stage]]:
    for module in model.modules():
        down, up = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(down, nn.ModuleDict) and isinstance(up, nn.ModuleDict):
            scales = getattr(module, "lora_magnitude_vector", {})
            for key in down.keys() & up.keys():
                layers: list = [down[key], up[key]]
                if all(isinstance(layer, nn.Linear) for layer in layers):
                    yield layers + ([scales[key].weight] if key in scales else [])
        elif isinstance(getattr(module, "adapter_down", None), nn.Sequential):
            layers = [layer for layer in (*module.adapter_down, module.adapter_up) if isinstance(layer, nn.Linear)]  # type: ignore[misc]
            if len(layers) == 2:
                yield layers


def _check_covered(paths: list[list[Stage]], layout: Layout) -> None:
    covered: set[int] = set()
    for path in paths:
        for stage in path:
            covered |= {id(stage)} if isinstance(stage, nn.Parameter) else {id(p) for p in stage.parameters()}
    for name, tensor in zip(layout.names, layout.tensors, strict=True):
        if id(tensor) not in covered:
            raise MethodError(
                f"synflow knows the linear layers of peft's LoRA and of bottleneck adapters; {name!r} is no part of one. "
                "Narrow the selection with include= and exclude=, or take another criterion."
            )
