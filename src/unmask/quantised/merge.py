"""Turns a quantised model, with what was trained in it, into ordinary float layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unmask.errors import SelectionError
from unmask.quantised.layers import is_trained, weights
from unmask.quantised.sources import Unsupported, sources
from unmask.quantised.tensor import QuantisedTensor

# The attributes by which transformers knows a quantised model, and would save it as one.
_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


@torch.no_grad()
def dequantise_and_merge(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replaces every quantised linear layer by an ordinary one that holds the base's value plus the change.

    The model then takes the memory of a float model, and it is no longer the model that was quantised. In float32 its weights
    are those that were trained; in half precision they are rounded. Quantising it again would round what was trained, and
    small changes would be lost; see docs/quantised.md.

    Args:
        model: A model with quantised layers, after a delta was applied or a selection was released. It is changed in place.
        dtype: The dtype of the new weights; biases keep theirs.

    Returns:
        The model; the new layer, if the model itself is one quantised layer.

    Raises:
        SelectionError: A selection is live, or a quantised weight is of a kind that cannot be read. Nothing is changed then.

    Example:
        >>> dequantise_and_merge(nn.Linear(2, 2))   # nothing is quantised here
        Linear(in_features=2, out_features=2, bias=True)
    """
    if is_trained(model):
        raise SelectionError("this model has a live selection; call its release() before merging.")
    for name, source in sources(model).items():
        if isinstance(source, Unsupported):
            raise SelectionError(f"cannot merge: {name!r} {source.reason}.")
    for tensor in weights(model).values():
        if isinstance(tensor, QuantisedTensor):
            old = tensor.sidecar.source.layer
            new = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta").train(old.training)
            weight = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
            for low, block in tensor.sidecar.blocks():
                weight[low : low + len(block)] = block
            new.weight, new.bias = nn.Parameter(weight, requires_grad=False), old.bias
            if model is old:
                return new
            for parent in model.modules():
                parent._modules.update({name: new for name, child in parent._modules.items() if child is old})
    marked: Any = model
    if getattr(marked, "is_quantized", False):  # transformers would save the model as a quantised one.
        for mark in _MARKS:
            marked.__dict__.pop(mark, None)
        if hasattr(marked.config, "quantization_config"):
            del marked.config.quantization_config
        marked.is_quantized = False
    return model
