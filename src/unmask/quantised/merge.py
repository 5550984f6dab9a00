"""Merging by explicit de-quantisation: a quantised model and its sidecars as ordinary float layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unmask.errors import SelectionError
from unmask.quantised.layers import is_trained, weights
from unmask.quantised.sources import Unsupported, sources
from unmask.quantised.tensor import QuantisedTensor

_BLOCK = 1 << 20  # weights that are de-quantised at a time
_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


@torch.no_grad()
def dequantise_and_merge(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replaces every quantised linear layer by an ordinary one that holds the base's value plus the change.

    The model then takes the memory of a float model, and is no longer what was quantised: in float32 its weights are those
    that were trained, in half precision their rounding. To quantise it again rounds what was trained, and small changes
    away; see docs/quantised.md.

    Args:
        model: A model with quantised layers, with a delta applied or a selection released; changed in place.
        dtype: Of the new weights; biases keep theirs.

    Returns:
        The model; the new layer, if the model itself is one quantised layer.

    Raises:
        SelectionError: A selection is live, or a quantised weight is of a kind that cannot be read; nothing is changed then.

    Example:
        >>> dequantise_and_merge(nn.Linear(2, 2))   # nothing is quantised here
        Linear(in_features=2, out_features=2, bias=True)
    """
    _check(model)
    for tensor in weights(model).values():
        if isinstance(tensor, QuantisedTensor):
            model = _replaced(model, tensor.sidecar.source.layer, _ordinary(tensor, dtype))
    _unmark(model)
    return model


def _check(model: nn.Module) -> None:
    if is_trained(model):
        raise SelectionError("this model has a live selection; call its release() before merging.")
    for name, source in sources(model).items():
        if isinstance(source, Unsupported):
            raise SelectionError(f"cannot merge: {name!r} {source.reason}.")


def _ordinary(tensor: QuantisedTensor, dtype: torch.dtype) -> nn.Linear:
    """An ordinary layer with a quantised one's current weights, filled block by block."""
    rows, columns = tensor.shape
    layer: Any = tensor.sidecar.source.layer
    made = nn.Linear(columns, rows, bias=False, device="meta")
    made.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=tensor.device), requires_grad=False)
    height = max(1, _BLOCK // max(1, columns))
    for low in range(0, rows, height):
        made.weight[low : low + height] = tensor[low : low + height].to(dtype)
    made.bias = layer.bias
    return made.train(layer.training)


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    if model is old:
        return new
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model


def _unmark(model: nn.Module) -> None:
    """Takes off what transformers says of a quantised model, or it would save this one as such."""
    marked: Any = model
    if not getattr(marked, "is_quantized", False):
        return
    for mark in _MARKS:
        marked.__dict__.pop(mark, None)
    if hasattr(marked.config, "quantization_config"):
        del marked.config.quantization_config
    marked.is_quantized = False
