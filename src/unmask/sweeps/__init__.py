"""Sweeps: grids of runs from one YAML file, run by several worker processes, kept as one JSON per run. No torch here."""

from unmask.sweeps.cells import Cell, expand
from unmask.sweeps.protocols import Estimate, best_of, interval
from unmask.sweeps.runner import Report, run_sweep
from unmask.sweeps.spec import Sweep, parse, read_sweep
from unmask.sweeps.store import Store

__all__ = [
    "Cell",
    "Estimate",
    "Report",
    "Store",
    "Sweep",
    "best_of",
    "expand",
    "interval",
    "parse",
    "read_sweep",
    "run_sweep",
]
