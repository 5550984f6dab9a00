"""Sweeps: grids of runs from one YAML file, run by several worker processes, kept as one JSON per run. No torch here."""

from unmask.lab.figures.estimates import Estimate, best_of, interval
from unmask.lab.study.cells import Cell, expand
from unmask.lab.study.parsing import parse, read_sweep
from unmask.lab.study.scheduler import SweepReport, run_sweep
from unmask.lab.study.spec import Sweep
from unmask.lab.study.store import Store

__all__ = [
    "Cell",
    "Estimate",
    "Store",
    "Sweep",
    "SweepReport",
    "best_of",
    "expand",
    "interval",
    "parse",
    "read_sweep",
    "run_sweep",
]
