"""The error that Ctrl-C in a command becomes."""

from __future__ import annotations

from unmask.errors import UnmaskError


class InterruptedCommandError(UnmaskError):
    """Ctrl-C has ended a command before it was done."""

    def __init__(self) -> None:
        super().__init__("interrupted before it was done; files that were whole before are kept.")
