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
        pruned before the last round, or that may not be selected: that one counts as pruned from the start.

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
    weights = torch.cat([layout.plain(index).double().abs().reshape(-1) for index in range(len(layout.tensors))])
    alive = torch.ones_like(weights, dtype=torch.bool)
    for index, start in enumerate(layout.starts):
        avoided = layout.avoided(index)
        if avoided is not None:
            alive[start + avoided] = False
    for k in range(1, ROUNDS + 1):
        magnitudes = (weights * alive).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(_flow(paths, _by_tensor(magnitudes, layout)), magnitudes)
        scores = (magnitudes.detach() * gradient).masked_fill(~alive, -1.0)
        if not scores.any():
            break  # There is no flow at all, as through a LoRA whose B is zero. The caller refuses that.
        if k < ROUNDS:
            keep = max(budget, round(layout.free * (budget / layout.free) ** (k / ROUNDS)))
            alive = torch.zeros_like(alive)
            alive[scores.argsort(descending=True, stable=True)[:keep]] = True  # A tie goes to the first.
    parts = _by_tensor(scores, layout).values()
    dtypes = [torch.promote_types(tensor.dtype, torch.float32) for tensor in layout.tensors]
    return {i: part.to(dtype) for i, (part, dtype) in enumerate(zip(parts, dtypes, strict=True))}


def _by_tensor(flat: Tensor, layout: Layout) -> dict[int, Tensor]:
    """Cuts a number for every eligible weight into tensors, by the id of each of the layout's."""
    parts = flat.split([tensor.numel() for tensor in layout.tensors])
    return {id(tensor): part.view(tensor.shape) for tensor, part in zip(layout.tensors, parts, strict=True)}


def _flow(paths: list[list[Stage]], magnitudes: dict[int, Tensor]) -> Tensor:
    """Returns R; tensors that have no magnitudes here are not eligible, and keep theirs."""

    def magnitude(tensor: Tensor) -> Tensor:
        return magnitudes[id(tensor)] if id(tensor) in magnitudes else tensor.detach().double().abs()

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
    return torch.stack(sums).sum()


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
