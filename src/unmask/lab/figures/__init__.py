"""Draws figures of runs from plain records. Drawing needs matplotlib (extra ``plot``); nothing here imports torch."""

from collections.abc import Callable

from unmask.lab.figures.maps import allocation_maps, delta_figure
from unmask.lab.figures.records import AllocationRow, CurvePoint, RunRecord, Snapshot
from unmask.lab.figures.scores import budget_sweep, parameter_sweep, score_along_run
from unmask.lab.figures.shares import score_against_share
from unmask.lab.figures.style import DARK, LIGHT, Figure, Style
from unmask.lab.figures.tensors import sparsity_entropy, tensor_sparsity
from unmask.lab.figures.writing import figure_files, svg, write_figure

FIGURES: dict[str, Callable[..., Figure]] = {
    "fig1": score_against_share,
    "fig4": parameter_sweep,
    "fig5": score_along_run,
    "fig6": budget_sweep,
    "fig7": allocation_maps,
    "fig8": tensor_sparsity,
    "fig9": sparsity_entropy,
}
"""The functions that draw the paper's figures: ``FIGURES["fig1"](records, style)`` returns a matplotlib figure."""

__all__ = [
    "DARK",
    "FIGURES",
    "LIGHT",
    "AllocationRow",
    "CurvePoint",
    "RunRecord",
    "Snapshot",
    "Style",
    "allocation_maps",
    "budget_sweep",
    "delta_figure",
    "figure_files",
    "parameter_sweep",
    "score_against_share",
    "score_along_run",
    "sparsity_entropy",
    "svg",
    "tensor_sparsity",
    "write_figure",
]
