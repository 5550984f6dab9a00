"""Tokens whose gradient is zero: padding, and in a last layer whatever the loss does not read.

A linear layer's backward may leave them out, exactly: they add nothing to the weight's gradient, and their own input's is zero.
Only on a CPU: to count them is to wait for the device.
"""

from __future__ import annotations

from torch import Tensor

LEAST = 64  # tokens below which nothing is looked for
SHARE = 0.85  # of the tokens, at most, must be left for leaving the others out to pay
_PROBE = 64  # rows that are looked at first
_FEW = 16  # columns that are looked at first


def live_rows(g: Tensor) -> Tensor | None:
    """The rows that are not zero.

    Args:
        g: (T, n), an output's gradient.

    Returns:
        (t,) int64, ascending; None where more than `SHARE` of the rows hold something, or zero rows are too few to be met in a
        sample.

    Example:
        >>> import torch
        >>> g = torch.zeros(100, 4)
        >>> g[7, 3] = 1.0
        >>> live_rows(g).tolist()
        [7]
    """
    if g.device.type != "cpu" or g.shape[0] < LEAST or not g.shape[1]:
        return None
    step = g.shape[0] // _PROBE | 1  # odd: sequences have even lengths, and every place in them must have its turn
    if not _silent(g[::step]).any():
        return None
    silent = _silent(g)
    maybe = silent.nonzero().squeeze(1)
    silent[maybe] = (g.index_select(0, maybe) == 0).all(1)
    live = (~silent).nonzero().squeeze(1)
    return live if live.numel() <= SHARE * g.shape[0] else None


def _silent(g: Tensor) -> Tensor:
    """Which rows may be zero."""
    return (g[:, :_FEW] == 0).all(1)


def spread_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Rows at their places among zeros: (t, n) as (count, n)."""
    return values.new_zeros(count, values.shape[1]).index_copy_(0, rows, values)
