"""Remembers which selections are live, and says whether a model has one."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from unmask.gradients.tapped import TappedParameter
from unmask.gradients.wrappers import bare
from unmask.quantised.layers import is_trained

LIVE: weakref.WeakSet[Any] = weakref.WeakSet()  # each has a ``model``; `unmask.selection.stepping` fills it


def has_selection(model: nn.Module) -> bool:
    """Returns True if a live selection was made from this model, or holds tensors of it."""
    if any(isinstance(p, TappedParameter) for p in model.parameters()) or is_trained(model):
        return True
    return any(live.model is bare(model) for live in list(LIVE))
