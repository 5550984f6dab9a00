"""Where results may be written: what cannot work is refused before the work starts. The standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from unmask.errors import ConfigError


def check_folder(path: str | os.PathLike[str], name: str = "output") -> Path:
    """The path of a folder that is there and can be written to, or that can be made; makes nothing.

    Args:
        path: The folder.
        name: What the user calls it, for the message.

    Raises:
        ConfigError: It is a file, or lies below one, or cannot be written to.

    Example:
        >>> check_folder("/dev/null/run")
        Traceback (most recent call last):
        unmask.errors.ConfigError: output = '/dev/null/run': '/dev/null' is a file; give a folder.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"{name} = {str(path)!r} is no name of a folder; give another.")
    try:
        there = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    except OSError as error:  # a name that is too long, say
        raise ConfigError(f"{name} = {str(path)!r:.200}: {error.strerror}; give another folder.") from error
    if not there.is_dir():
        raise ConfigError(f"{name} = {str(path)!r}: {str(there)!r} is a file; give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} = {str(path)!r}: {str(there)!r} cannot be written to; give another folder.")
    return path
