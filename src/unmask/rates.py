"""A learning rate per slot: what a slot's rate is multiplied by, from where the selected weights lie."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.gradients.plan import Tentative
from unmask.slots import Layout, SlotTable


def row_column_scale(layout: Layout, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``1 / sqrt(n_i m_j)``: n_i selected weights in the row, m_j in the column of the tensor that a slot's weight is in.

    An update whose entries are at most lr times this has a spectral norm of at most lr in every tensor, wherever the selected
    weights lie: it is bounded by lr times the normalised adjacency matrix of a bipartite graph, whose norm is 1. So one
    lr fits masks that spread (there n = m = 1 nearly) and masks that pile up, down to all weights of a tensor.

    Args:
        layout: The tensors; a vector counts as a column, so that its update has a norm of at most lr.
        positions: (B,) int64, one per slot; -1 for a slot that holds nothing.
        dtype: Of the result.

    Returns:
        (B,), in (0, 1]; 1 where a slot holds nothing.

    Example:
        >>> layout = Layout(["weight"], [torch.zeros(2, 3)])
        >>> row_column_scale(layout, torch.tensor([0, 1, 5, -1])).square().round(decimals=4).tolist()
        [0.5, 0.5, 1.0, 1.0]
    """
    scale = torch.ones(positions.shape, dtype=dtype, device=positions.device)
    held = (positions >= 0).nonzero().squeeze(1)
    for _, entries in layout.entries(positions[held]):
        count = torch.ones(entries.flat.numel(), dtype=torch.int64, device=entries.flat.device)
        for lines in (entries.rows, entries.columns):
            count *= torch.bincount(lines)[lines]
        scale[held[entries.slots]] = count.to(scale).rsqrt_()
    return scale


class SlotScale:
    """The scale of a selection's slots, made anew only where they have changed."""

    def __init__(self) -> None:
        self._tentative: Tentative | None = None
        self._due = -1
        self._scale = torch.empty(0)

    def of(self, table: SlotTable, tentative: Tentative | None, due: int) -> Tensor:
        """`row_column_scale` of the first ``due`` slots, once a tentative selection is made: (B,)."""
        if due != self._due or tentative is not self._tentative:
            positions = table.positions.clone()
            if tentative is not None:
                positions[tentative.slots] = tentative.positions
            positions[due:] = -1
            self._tentative, self._due = tentative, due
            self._scale = row_column_scale(table.layout, positions, table.base.dtype)
        return self._scale
