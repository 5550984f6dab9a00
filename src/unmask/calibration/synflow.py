"""Scores the weights of added modules by SynFlow: iterative pruning by synaptic flow, without data (arXiv 2006.05467)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from unmask.errors import MethodError
from unmask.ranking.ledger import Layout

ROUNDS = 100
Stage = nn.Linear | nn.Parameter
"""One stage of an added module: a layer, or a vector that scales its outputs (DoRA's magnitude)."""


def synaptic_flow(model: nn.Module, layout: Layout, budget: int) -> dict[int, Tensor]:
    """Computes scores ``|w| dR/d|w|`` whose ``budget`` best are the weights that SynFlow keeps.

    As in SparseAdapter's code, each added module is a network for itself. Its weights are replaced by their magnitudes, it is
    fed with ones, and R is the sum of all outputs. So softmax, LayerNorm and the base's weights play no part. The non-linearity
    between the two layers of a bottleneck is the identity, as ReLU is on these positive inputs. Dropout, a LoRA's scaling and
    the residual are left out. The budget is reached in `ROUNDS` rounds of exponentially falling density, and each round scores
    what the last one left.

    Args:
        model: The model, with LoRA layers of peft or bottleneck adapters.
        layout: The eligible tensors, which must all belong to such modules.
        budget: The number of weights that stay.

    Returns:
        The score by tensor index, of the tensor's shape, float32 (float64 for a float64 tensor). It is -1 for a weight that was
        pruned before the last round.

    Raises:
        MethodError: An eligible tensor belongs to no linear layer of a LoRA or a bottleneck adapter.
    """
    paths = list(_paths(model))
    covered = {
        id(p)
        for path in paths
        for stage in path
        for p in ([stage] if isinstance(stage, nn.Parameter) else stage.parameters())
    }
    for name, tensor in zip(layout.names, layout.tensors, strict=True):
        if id(tensor) not in covered:
            raise MethodError(
                f"synflow knows the linear layers of peft's LoRA and of bottleneck adapters; {name!r} is no part of one. "
                "Narrow the selection with include= and exclude=, or take another criterion."
            )
    weights = [layout.plain(index).double().abs() for index in range(len(layout.tensors))]
    alive = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    total = sum(weight.numel() for weight in weights)
    for k in range(1, ROUNDS + 1):
        flows = _flow(paths, layout, weights, alive)
        scores = [flow.masked_fill(~mask, -1.0) for flow, mask in zip(flows, alive, strict=True)]
        if not any(score.any() for score in scores):
            break  # There is no flow at all, as through a LoRA whose B is zero. The caller refuses that.
        if k < ROUNDS:
            keep = max(budget, round(total * (budget / total) ** (k / ROUNDS)))
            alive = _best(scores, keep)
    return {i: score.to(torch.promote_types(layout.tensors[i].dtype, torch.float32)) for i, score in enumerate(scores)}


def _flow(paths: list[list[Stage]], layout: Layout, weights: list[Tensor], alive: list[Tensor]) -> list[Tensor]:
    """Returns ``|w| dR/d|w|`` of every weight; weights that were pruned count as zero."""
    leaves = [(w * mask).requires_grad_() for w, mask in zip(weights, alive, strict=True)]
    by_id = {id(tensor): leaf for tensor, leaf in zip(layout.tensors, leaves, strict=True)}

    def magnitude(tensor: Tensor) -> Tensor:
        return by_id[id(tensor)] if id(tensor) in by_id else tensor.detach().double().abs()

    with torch.enable_grad():
        sums = []
        for path in paths:
            first = path[0]
            assert isinstance(first, nn.Linear)
            x = first.weight.new_ones(first.in_features, dtype=torch.float64)
            for stage in path:
                if isinstance(stage, nn.Parameter):
                    x = x * magnitude(stage).reshape(-1)
                else:
                    x = magnitude(stage.weight) @ x
                    x = x if stage.bias is None else x + magnitude(stage.bias)
            sums.append(x.sum().cpu())
        total = torch.stack(sums).sum()
        gradients = torch.autograd.grad(total, leaves)
    return [leaf.detach() * gradient for leaf, gradient in zip(leaves, gradients, strict=True)]


def _best(scores: list[Tensor], keep: int) -> list[Tensor]:
    """Returns masks of the ``keep`` highest scores of all tensors together; a tie goes to the first."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:keep]] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def _paths(model: nn.Module) -> Iterator[list[Stage]]:
    """Yields the stages of each added module, in the order in which they run."""
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
