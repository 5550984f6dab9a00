"""Clips the gradient of a selection: by the norm of what it trains, or by that of the whole gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from unmask.selection.selection import Selection


def clip_grad_norm_(
    selection: Selection, max_norm: float, loss_scale: float = 1.0, others: Sequence[Tensor] = ()
) -> Tensor:
    """Scales the gradient of what a selection trains, in place, so that a norm is at most ``max_norm``.

    Under ``select(..., clip_scope="selected")`` it is the norm of that gradient, and this is
    ``torch.nn.utils.clip_grad_norm_(selection.parameters(), max_norm)``. Under ``"all"`` it is the norm of the gradient of
    every eligible weight, selected or not, and of the dense tensors: full fine-tuning with a mask would clip by it.

    Args:
        selection: A live selection; call this between ``backward`` and ``step``.
        max_norm: The largest norm allowed; infinity only measures.
        loss_scale: The factor by which the loss was multiplied, ``scaler.get_scale()``, if ``GradScaler.unscale_`` has divided
            the gradients since.
        others: Further parameters that the optimizer trains: their gradients count, and are scaled, with the rest.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        SelectionError: ``clip_scope="all"`` and no backward has been run since the last step.

    Example:
        >>> import torch, unmask
        >>> model = torch.nn.Linear(8, 4)
        >>> selection = unmask.select(model, unmask.id3(budget=6, steps=3), clip_scope="all")
        >>> optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> norm = unmask.clip_grad_norm_(selection, max_norm=1.0)
        >>> bool(norm > selection.values.grad.norm())
        True
    """
    return selection.clip_grad_norm_(max_norm, loss_scale, others)
