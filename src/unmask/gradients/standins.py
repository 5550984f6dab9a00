"""What stands for a tapped tensor in a graph: an alias, or a token, and the Functions that hand its gradient over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.gradients.factors import Pending
from unmask.gradients.sampled import take_gradient
from unmask.gradients.tapped import Site
from unmask.slots import Entries


@dataclass(frozen=True)
class Tapped:
    """What stands for a tapped tensor in one forward.

    Attributes:
        proxy: An alias of the tensor, or a token: a vector of zeros.
        entries: The m entries that a token (m,) stands for: its gradient is theirs.
        pending: Where the uses put their gradients; its token (1,) gets a gradient of zero.
    """

    proxy: Tensor
    entries: Entries | None = None
    pending: Pending | None = None

    @property
    def alias(self) -> bool:
        """Whether the proxy may take the tensor's place."""
        return self.entries is None and self.pending is None


class Tap(torch.autograd.Function):
    """Identity on a weight or a token; its backward hands the gradient over instead of propagating it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, anchor: Tensor, stand_in: Tensor, site: Site, entries: Entries | None, pending: Pending | None
    ) -> Tensor:
        ctx.site, ctx.entries, ctx.pending = site, entries, pending
        return stand_in.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        whole = gradient.detach() if ctx.pending is None else ctx.pending.take()
        ctx.site.taps.fire(ctx.site.index, whole, ctx.entries)
        return (None,) * 5


class Gather(torch.autograd.Function):
    """A token as the weight it stands for; its backward gathers the dense gradient's entries."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, weight: Tensor, entries: Entries) -> Tensor:  # type: ignore[override]
        ctx.entries, ctx.dtype = entries, token.dtype
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient = gradient.coalesce() if gradient.is_sparse else gradient
        return take_gradient(gradient, ctx.entries).to(ctx.dtype), None, None


class Whole(torch.autograd.Function):
    """A token as the weight it stands for; its backward puts the dense gradient into the `Pending`."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, weight: Tensor, pending: Pending) -> Tensor:  # type: ignore[override]
        ctx.pending = pending
        ctx.save_for_backward(token)
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (token,) = ctx.saved_tensors
        ctx.pending.put(gradient.detach().coalesce() if gradient.is_sparse else gradient.detach())
        return torch.zeros_like(token), None, None
