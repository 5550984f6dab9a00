"""The paper's tables and figures as sweeps, and its settings as presets. No torch here.

The YAML files lie in ``unmask/reproduce/data`` (``experiments/reproduce`` in a checkout).
"""

from unmask.reproduce.loading import NAMES, Scale, load
from unmask.reproduce.settings import PRESETS, Preset, preset, presets

__all__ = ["NAMES", "PRESETS", "Preset", "Scale", "load", "preset", "presets"]
