"""Clipping: by the norm of what the selection trains, or by that of the whole gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmask.errors import SelectionError
from unmask.gradients.factors import total_norm

if TYPE_CHECKING:
    from unmask.selection.selection import Selection


def clip_grad_norm_(
    selection: Selection, max_norm: float, loss_scale: float = 1.0, beside: Sequence[Tensor] = ()
) -> Tensor:
    """Scales the gradient of what a selection trains, in place, so that a norm is at most ``max_norm``.

    Under ``select(..., clip_scope="selected")`` it is the norm of that gradient, and this is
    ``torch.nn.utils.clip_grad_norm_(selection.parameters(), max_norm)``. Under ``"all"`` it is the norm of the gradient of
    every eligible weight, selected or not, and of the dense tensors: what full fine-tuning with a mask would clip by.

    Args:
        selection: A live selection; call this between ``backward`` and ``step``.
        max_norm: The largest norm allowed; infinity only measures.
        loss_scale: What the loss was multiplied by, if ``GradScaler.unscale_`` has divided the gradients since:
            ``scaler.get_scale()``.
        beside: Further parameters that the optimizer trains: their gradients count, and are scaled, with the rest.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        SelectionError: ``clip_scope="all"`` and no backward has been run since the last step.

    Example:
        >>> import unmask
        >>> model = torch.nn.Linear(8, 4)
        >>> selection = unmask.select(model, unmask.id3(budget=6, steps=3), clip_scope="all")
        >>> optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> norm = unmask.clip_grad_norm_(selection, max_norm=1.0)
        >>> bool(norm > selection.values.grad.norm())
        True
    """
    trained = [*selection.parameters(), *beside]
    if selection.clip_scope == "selected" or selection.method.whole:
        return torch.nn.utils.clip_grad_norm_(trained, max_norm)
    gradients = [p.grad for p in trained if p.grad is not None]
    norm = _whole_norm(selection, loss_scale, beside)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's
    for gradient in gradients:
        gradient.mul_(factor.to(gradient))
    return norm


def _whole_norm(selection: Selection, loss_scale: float, beside: Sequence[Tensor]) -> Tensor:
    measured = selection._window.norm
    if measured is None:
        raise SelectionError(
            "there is no gradient to clip: the order is loss.backward(), clip_grad_norm_(selection, ...), optimizer.step()."
        )
    whole = [*(tensor.master for tensor in selection.dense), *beside]
    return total_norm([measured / loss_scale, *(p.grad for p in whole if p.grad is not None)])
