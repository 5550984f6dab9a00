"""Every error that unmask raises on purpose.

```
UnmaskError
├── MethodError (ValueError)          a method, budget, schedule or pattern that cannot work
├── SelectionError (RuntimeError)     a selection used in an order that cannot work
│   ├── ScheduleNotRunError           an optimizer stepped, but the schedule could not run
│   └── NonFiniteGradientError        NaN or infinity reached the gradients
├── DeltaError (ValueError)           a delta that is damaged, or that belongs to another base
├── DataError (ValueError)            a data set, file, column or label that cannot be used
├── ConfigError (ValueError)          a run configuration that cannot work
└── MissingExtraError (ImportError)   an optional dependency is not installed
```

What it warns of is an `UnmaskWarning` (UserWarning).
"""

from __future__ import annotations

import importlib.util
from types import ModuleType


class UnmaskError(Exception):
    """Base of all errors that unmask raises on purpose."""


class MethodError(UnmaskError, ValueError):
    """A method, budget, schedule, scope or pattern that cannot work on this model."""


class SelectionError(UnmaskError, RuntimeError):
    """A selection was used in an order, or on a model, that cannot work."""


class ScheduleNotRunError(SelectionError):
    """An optimizer stepped, but the unmasking schedule could not run."""


class NonFiniteGradientError(SelectionError):
    """NaN or infinity reached the gradients; nothing was changed."""


class DeltaError(UnmaskError, ValueError):
    """A delta is damaged, or does not belong to this model; nothing was changed."""


class DataError(UnmaskError, ValueError):
    """A data set, file, column or label cannot be used."""


class ConfigError(UnmaskError, ValueError):
    """A run configuration cannot work."""


class UnmaskWarning(UserWarning):
    """A run goes on and its result is right, but it is probably not what was meant."""


class MissingExtraError(UnmaskError, ImportError):
    """An optional dependency is not installed."""


def need(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency, or says which extra brings it.

    Args:
        module: Dotted module name, e.g. ``"sklearn.metrics"``.
        extra: The extra of unmask that installs it, e.g. ``"eval"``.

    Raises:
        MissingExtraError: The module's package is not installed.

    Example:
        >>> need("math", "eval").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if importlib.util.find_spec(package) is not None:  # it is there, and lacks something itself
            raise
        raise MissingExtraError(
            f"{package!r} is not installed, and this needs it: pip install 'unmask[{extra}]'."
        ) from error
