"""Runs an embedding so that its backward forms the gradient of the rows that were read, and of no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.gradients.tapped import StandIn, TappedParameter, stand_in_of


def embedding(
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Handles ``F.embedding`` if the table has more rows than there are tokens; leaves it to autograd otherwise."""
    if max_norm is not None or scale_grad_by_freq or not isinstance(weight, TappedParameter):
        return NotImplemented
    stand_in = stand_in_of(weight) if weight.shape[0] > input.numel() else None
    if stand_in is None or stand_in.alias:
        return NotImplemented
    return SampledEmbedding.apply(input, weight, stand_in.proxy, stand_in, padding_idx)


class SampledEmbedding(torch.autograd.Function):
    """Rows of a table; the backward makes the table's gradient in the rows that were read, or at its entries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, ids: Tensor, weight: Tensor, placeholder: Tensor, stand_in: StandIn, padding_idx: int | None
    ) -> Tensor:
        ctx.stand_in, ctx.dtype, ctx.shape = stand_in, placeholder.dtype, weight.shape
        ctx.padding = None if padding_idx is None else padding_idx % weight.shape[0]
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight.detach(), padding_idx)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1]).to(ctx.dtype)
        rows = embedding_gradient(g, ids.reshape(-1), ctx.shape, ctx.padding)
        return None, None, ctx.stand_in.pass_on(rows), None, None


def embedding_gradient(g: Tensor, ids: Tensor, shape: torch.Size, padding: int | None) -> Tensor:
    """Makes an embedding's gradient as a coalesced sparse tensor in whole rows; a row's tokens are summed in their order.

    Args:
        g: The gradient of the output: (T, columns).
        ids: The row that each token read: (T,) int64.
        shape: The shape of the table.
        padding: The row whose gradient is zero; None if there is none.
    """
    if padding is not None:
        kept = (ids != padding).nonzero().squeeze(1)
        g, ids = g[kept], ids[kept]
    rows, inverse = ids.unique(return_inverse=True)
    sums = torch.zeros(rows.numel(), g.shape[1], dtype=g.dtype, device=g.device).index_add_(0, inverse, g)
    return torch.sparse_coo_tensor(rows[None], sums, shape, is_coalesced=True, check_invariants=False)
