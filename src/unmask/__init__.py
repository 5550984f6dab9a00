"""unmask: fine-tune a network by changing a budget of single scalar weights, and keep the result as an exact delta.

Names are imported on first use, so that ``unmask --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unmask.version import __version__

if TYPE_CHECKING:
    from unmask.delta.delta import SparseDelta
    from unmask.delta.sparse import SparseTensor
    from unmask.errors import (
        ConfigError,
        DataError,
        DeltaError,
        MethodError,
        MissingExtraError,
        NonFiniteGradientError,
        ProcessesDifferError,
        ScheduleNotRunError,
        SelectionError,
        UnmaskError,
        UnmaskWarning,
        WriteError,
    )
    from unmask.methods.heuristics import Heuristic, heuristic, heuristic_names, register_heuristic
    from unmask.methods.method import Method
    from unmask.methods.presets import (
        PRESETS,
        bitfit,
        fish,
        full,
        id3,
        pafi,
        random_mask,
        repeat_d3,
        sparse_adapter,
        static_d3,
    )
    from unmask.methods.schedules import SCHEDULES, Schedule, schedule
    from unmask.methods.scopes import Scope, patterns
    from unmask.selection.clipping import clip_grad_norm_
    from unmask.selection.optim import SelectiveAdamW
    from unmask.selection.select import select
    from unmask.selection.selection import Selection

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
    "ProcessesDifferError",
    "Schedule",
    "ScheduleNotRunError",
    "Scope",
    "Selection",
    "SelectionError",
    "SelectiveAdamW",
    "SparseDelta",
    "SparseTensor",
    "UnmaskError",
    "UnmaskWarning",
    "WriteError",
    "__version__",
    "bitfit",
    "clip_grad_norm_",
    "fish",
    "full",
    "heuristic",
    "heuristic_names",
    "id3",
    "pafi",
    "patterns",
    "random_mask",
    "register_heuristic",
    "repeat_d3",
    "schedule",
    "select",
    "sparse_adapter",
    "static_d3",
]

# Modules to look a public name up in, cheapest first. Functions that share a module's name are listed by their module.
_HOMES = {
    "unmask.errors": {name for name in __all__ if name.endswith(("Error", "Warning"))},
    "unmask.selection.clipping": {"clip_grad_norm_"},
    "unmask.delta.sparse": {"SparseTensor"},
    "unmask.delta.delta": {"SparseDelta"},
    "unmask.methods.heuristics": {"Heuristic", "heuristic", "heuristic_names", "register_heuristic"},
    "unmask.methods.schedules": {"SCHEDULES", "Schedule", "schedule"},
    "unmask.methods.scopes": {"Scope", "patterns"},
    "unmask.selection.select": {"select"},
    "unmask.selection.selection": {"Selection"},
    "unmask.selection.optim": {"SelectiveAdamW"},
    "unmask.methods.method": {"Method"},
    "unmask.methods.presets": {
        *("PRESETS", "bitfit", "fish", "full", "id3", "pafi", "random_mask", "repeat_d3"),
        *("sparse_adapter", "static_d3"),
    },
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'unmask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
