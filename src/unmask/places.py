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
    _check(path, _nearest(path, name, "folder"), name, "folder")
    return path


def check_file(path: str | os.PathLike[str], name: str = "output") -> Path:
    """The path of a file that can be written, or written over; makes nothing.

    Args:
        path: The file. The folders above it need not be there.
        name: What the user calls it, for the message.

    Raises:
        ConfigError: It is a folder, or lies below a file, or its folder cannot be written to.

    Example:
        >>> check_file("/dev/null/report.html", "--output")
        Traceback (most recent call last):
        unmask.errors.ConfigError: --output = '/dev/null/report.html': '/dev/null' is a file; give another file.
    """
    path = Path(path)
    there = _nearest(path, name, "file")
    if path.is_dir():
        raise ConfigError(f"{name} = {str(path)!r} is a folder; give the name of a file.")
    _check(path, path.absolute().parent if there == path else there, name, "file")
    return path


def _nearest(path: Path, name: str, what: str) -> Path:
    """The path itself if it is there, else the nearest folder (or file) above it that is."""
    if "\0" in str(path):
        raise ConfigError(f"{name} = {str(path)!r} is no name of a {what}; give another.")
    try:
        return next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    except OSError as error:  # a name that is too long, say
        raise ConfigError(f"{name} = {str(path)!r:.200}: {error.strerror}; give another {what}.") from error


def _check(path: Path, there: Path, name: str, what: str) -> None:
    """Refuses a path of which ``there`` is no folder that can be written to."""
    if not there.is_dir():
        article = "a" if what == "folder" else "another"
        raise ConfigError(f"{name} = {str(path)!r}: {str(there)!r} is a file; give {article} {what}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} = {str(path)!r}: {str(there)!r} cannot be written to; give another {what}.")
