"""The paper's tables and figures as sweeps, and its settings as presets. No torch here.

The YAML files lie in ``unmask/reproduce/data`` (``experiments/reproduce`` in a checkout).
"""

from unmask.reproduce.loading import NAMES, Scale, load
from unmask.reproduce.table7 import Preset, preset, presets

__all__ = ["NAMES", "Preset", "Scale", "load", "preset", "presets"]
