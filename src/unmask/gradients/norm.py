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
        0-d, on the first tensor's device (the CPU for none); float64 if one of the tensors is, else float32.

    Example:
        >>> total_norm([torch.tensor([[3.0]]), torch.tensor([4.0], dtype=torch.bfloat16)]).item()
        5.0
    """
    if not tensors:
        return torch.zeros(())
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    norms = [torch.linalg.vector_norm(_entries(t), dtype=wide).to(tensors[0].device) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def _entries(tensor: Tensor) -> Tensor:
    return tensor.values() if tensor.is_sparse else tensor
