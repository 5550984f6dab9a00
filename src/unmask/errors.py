"""Every error that unmask raises on purpose.

```
UnmaskError
├── MethodError (ValueError)          a method, budget, schedule or pattern that cannot work
├── SelectionError (RuntimeError)     a selection used in an order that cannot work
│   ├── ScheduleNotRunError           an optimizer stepped, but the schedule could not run
│   ├── NonFiniteGradientError        NaN or infinity reached the gradients
│   └── ProcessesDifferError          processes that train together differ, are out of step, or one of them is lost
├── DeltaError (ValueError)           a delta that is damaged, or that belongs to another base
├── DataError (ValueError)            a data set, file, column or label that cannot be used
├── ConfigError (ValueError)          a run configuration that cannot work
├── WriteError (OSError)              a file that cannot be written: a full disk, no permission
└── MissingExtraError (ImportError)   an optional dependency is not installed
```

What it warns of is an `UnmaskWarning` (UserWarning).
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
from collections.abc import Iterator
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


class ProcessesDifferError(SelectionError):
    """Processes that train together differ or are out of step, or one of them is lost; all of them raise it."""


class DeltaError(UnmaskError, ValueError):
    """A delta is damaged, or does not belong to this model; nothing was changed."""


class DataError(UnmaskError, ValueError):
    """A data set, file, column or label cannot be used."""


class ConfigError(UnmaskError, ValueError):
    """A run configuration cannot work."""


class WriteError(UnmaskError, OSError):
    """A file cannot be written: the disk is full, or may not be written to. What was whole before is still there."""


class UnmaskWarning(UserWarning):
    """A run goes on and its result is right, but it is probably not what was meant."""


class MissingExtraError(UnmaskError, ImportError):
    """An optional dependency is not installed."""


_CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
# of libraries that write by themselves, and raise errors that are no OSError
_SAID = ("No space left on device", "File too large", "Disk quota exceeded", "file write failed", "unexpected pos")


def cannot_write(error: BaseException) -> str | None:
    """Why nothing could be written, in a few words, if that is what an error says; None for any other error.

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
def writing_to(path: str | os.PathLike[str], kept: str = "what was there before is kept") -> Iterator[None]:
    """Turns any library's error of a full disk, or of a place that cannot be written to, into a `WriteError`.

    Args:
        path: What is written, for the message.
        kept: What the user still has, for the message.

    Raises:
        WriteError: It cannot be written.

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
            f"{str(path)!r} cannot be written ({why}); {kept}. Free some space, or write elsewhere."
        ) from error


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
