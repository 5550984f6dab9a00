"""unmask: fine-tune a network by changing a budget of single scalar weights, and keep the result as an exact delta.

A public name is imported when it is first used, so that ``unmask --help`` does not wait for torch. ``__init__.pyi`` holds the
same names for type checkers. The presets are those of `unmask.methods.presets.PRESETS`.
"""

from importlib import import_module
from typing import Any

from unmask import errors

__version__ = "0.1.0"

_NAMES = {
    "errors": [name for name in vars(errors) if name.endswith(("Error", "Warning"))],
    "delta.combine": ("combine",),
    "delta.delta": ("SparseDelta",),
    "delta.ladder": ("Ladder",),
    "delta.sparse": ("SparseTensor",),
    "delta.swap": ("swap",),
    "methods.budget": ("Budget",),
    "methods.heuristics": ("Heuristic", "heuristic", "heuristic_names", "register_heuristic"),
    "methods.method": ("Method",),
    "methods.presets": ("PRESETS",),
    "methods.schedules": ("SCHEDULES", "Schedule"),
    "methods.scopes": ("Scope",),
    "selection.clipping": ("clip_grad_norm_",),
    "selection.optim": ("SelectiveAdamW",),
    "selection.select": ("select",),
    "selection.selection": ("Selection",),
}
_HOMES = {name: f"unmask.{module}" for module, names in _NAMES.items() for name in names}
_PACKAGES = ("analysis", "integrations", "methods", "peft", "quantised", "sync")


def __getattr__(name: str) -> Any:
    if name == "__all__":
        value: Any = sorted([*_HOMES, *__getattr__("PRESETS"), "__version__"])
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _PACKAGES:
        return import_module(f"unmask.{name}")
    elif not name.startswith("_") and name in __getattr__("PRESETS"):
        value = __getattr__("PRESETS")[name]
    else:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__getattr__("__all__"), *_PACKAGES])
