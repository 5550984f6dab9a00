"""Measures a selection, a delta or two checkpoints: how many tensors changed, where, and how two masks agree."""

from unmask.analysis.allocation import allocation, grouped, snapshot, snapshots
from unmask.analysis.checkpoints import changed
from unmask.analysis.drift import Drift, drift, rank_correlation, turnover
from unmask.analysis.mask import Mask, mask_of, mask_over
from unmask.analysis.measures import Overlap, densities, gradient_updates, overlap, sparsity_entropy, tensor_sparsity

__all__ = [
    "Drift",
    "Mask",
    "Overlap",
    "allocation",
    "changed",
    "densities",
    "drift",
    "gradient_updates",
    "grouped",
    "mask_of",
    "mask_over",
    "overlap",
    "rank_correlation",
    "snapshot",
    "snapshots",
    "sparsity_entropy",
    "tensor_sparsity",
    "turnover",
]
