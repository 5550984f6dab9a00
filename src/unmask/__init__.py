"""unmask: fine-tune a network by changing a budget of single scalar weights, and keep the result as an exact delta."""

from unmask.delta import SparseDelta, SparseTensor
from unmask.errors import (
    ConfigError,
    DataError,
    DeltaError,
    MethodError,
    MissingExtraError,
    NonFiniteGradientError,
    ScheduleNotRunError,
    SelectionError,
    UnmaskError,
)
from unmask.heuristics import Heuristic, heuristic, heuristics, register_heuristic
from unmask.methods import PRESETS, Method, bitfit, fish, full, id3, pafi, random_mask, repeat_d3, static_d3
from unmask.schedules import SCHEDULES, Schedule, schedule
from unmask.scopes import Scope, patterns
from unmask.selection import Selection, select
from unmask.version import __version__

__all__ = [
    "PRESETS",
    "SCHEDULES",
    "ConfigError",
    "DataError",
    "DeltaError",
    "Heuristic",
    "Method",
    "MethodError",
    "MissingExtraError",
    "NonFiniteGradientError",
    "Schedule",
    "ScheduleNotRunError",
    "Scope",
    "Selection",
    "SelectionError",
    "SparseDelta",
    "SparseTensor",
    "UnmaskError",
    "__version__",
    "bitfit",
    "fish",
    "full",
    "heuristic",
    "heuristics",
    "id3",
    "pafi",
    "patterns",
    "random_mask",
    "register_heuristic",
    "repeat_d3",
    "schedule",
    "select",
    "static_d3",
]
