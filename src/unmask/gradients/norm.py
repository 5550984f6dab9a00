"""The norm of a gradient in many tensors, taken without a copy of any."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all entries together.

    Args:
        tensors: Of any shapes, floating dtypes and devices; a sparse one must be coalesced.

    Returns:
        0-d float64, on the first tensor's device (the CPU for none): squares of float32 gradients do not overflow there.

    Example:
        >>> total_norm([torch.tensor([[3.0]]), torch.tensor([4.0], dtype=torch.bfloat16)]).item()
        5.0
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    device = tensors[0].device
    return torch.linalg.vector_norm(torch.stack([_norm(tensor).to(device) for tensor in tensors]))


def _norm(tensor: Tensor) -> Tensor:
    entries = tensor.values() if tensor.is_sparse else tensor
    wide = torch.float64 if entries.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(entries, dtype=wide).double()
