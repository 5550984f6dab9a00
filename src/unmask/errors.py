"""Defines every error that unmask raises on purpose.

```
UnmaskError
├── MethodError (ValueError)          A method, budget, schedule or pattern cannot work.
├── SelectionError (RuntimeError)     A selection was used in an order that cannot work.
│   ├── ScheduleNotRunError           An optimizer stepped, but the schedule could not run.
│   ├── NonFiniteGradientError        NaN or infinity reached the gradients.
│   └── ProcessesDifferError          Processes that train together differ, are out of step, or one is lost.
├── DeltaError (ValueError)           A delta is damaged, or it belongs to another base.
├── SyncError (RuntimeError)          A message between a trainer and a receiver was refused, or cannot be sent.
│   └── SyncTimeoutError (TimeoutError)  No message came in time.
├── DataError (ValueError)            A data set, file, column or label cannot be used.
├── ConfigError (ValueError)          A run's configuration cannot work.
├── WriteError (OSError)              A file cannot be written: the disk is full, or permission is missing.
└── MissingExtraError (ImportError)   An optional dependency is not installed.
```

Warnings of unmask have the class `UnmaskWarning` (UserWarning).
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType


class UnmaskError(Exception):
    """The base class of all errors that unmask raises on purpose."""


class MethodError(UnmaskError, ValueError):
    """Says that a method, budget, schedule, scope or pattern cannot work on this model."""


class SelectionError(UnmaskError, RuntimeError):
    """Says that a selection was used in an order, or on a model, that cannot work."""


class ScheduleNotRunError(SelectionError):
    """Says that an optimizer stepped, but the unmasking schedule could not run."""


class NonFiniteGradientError(SelectionError):
    """Says that NaN or infinity reached the gradients. Nothing was changed."""


class ProcessesDifferError(SelectionError):
    """Says that processes that train together differ or are out of step, or that one is lost. All of them raise it."""


class DeltaError(UnmaskError, ValueError):
    """Says that a delta is damaged, or does not belong to this model. Nothing was changed."""


class SyncError(UnmaskError, RuntimeError):
    """Says that a message of `unmask.sync` was refused, or cannot be sent or received. The receiver's model is unchanged."""


class SyncTimeoutError(SyncError, TimeoutError):
    """Says that no message of `unmask.sync` came in time."""


class DataError(UnmaskError, ValueError):
    """Says that a data set, file, column or label cannot be used."""


class ConfigError(UnmaskError, ValueError):
    """Says that a run's configuration cannot work."""


class WriteError(UnmaskError, OSError):
    """Says that a file cannot be written. A file that was whole before is still there."""


class UnmaskWarning(UserWarning):
    """Says that a run goes on and its result is right, but that the user probably meant something else."""


class MissingExtraError(UnmaskError, ImportError):
    """Says that an optional dependency is not installed."""


_CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
# Some libraries write files themselves and raise an error that is not an OSError. These words identify it.
_SAID = ("No space left on device", "File too large", "Disk quota exceeded", "file write failed", "unexpected pos")


def cannot_write(error: BaseException) -> str | None:
    """Returns why a file could not be written if an error says so, in a few words; None for any other error.

    Example:
        >>> cannot_write(OSError(errno.ENOSPC, "No space left on device", "a/b"))
        "No space left on device: 'a/b'"
        >>> cannot_write(ValueError("something else"))
    """
    if isinstance(error, OSError):
        if error.errno not in _CANNOT_WRITE:
            return None
        name = "" if error.filename is None else f": {str(error.filename)!r}"
        return f"{error.strerror or os.strerror(error.errno)}{name}"
    text = str(error)
    return text.splitlines()[0] if any(words in text for words in _SAID) else None


@contextlib.contextmanager
def writing_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns any library's error about a full disk or a read-only place into a `WriteError` that names the path.

    Raises:
        WriteError: The path cannot be written to.

    Example:
        >>> try:
        ...     with writing_to("run/delta.safetensors"):
        ...         raise OSError(errno.ENOSPC, "No space left on device")
        ... except WriteError as error:
        ...     print(str(error)[:68])
        'run/delta.safetensors' cannot be written (No space left on device);
    """
    try:
        yield
    except Exception as error:
        why = None if isinstance(error, UnmaskError) else cannot_write(error)
        if why is None:
            raise
        raise WriteError(
            f"{str(path)!r} cannot be written ({why}); what was there before is kept. Free some space, or write elsewhere."
        ) from error


def need(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency (``"sklearn.metrics"``), or says which extra of unmask (``"eval"``) installs it.

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
        if importlib.util.find_spec(package) is not None:
            raise  # The package is installed, but a module that it needs is not.
        raise MissingExtraError(
            f"{package!r} is not installed, and this needs it: pip install 'unmask[{extra}]'."
        ) from error
