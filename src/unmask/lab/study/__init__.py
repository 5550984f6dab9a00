"""Runs sweeps: grids of runs from one YAML file, made by workers here or on a Ray cluster. Each run has a JSON file."""

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
