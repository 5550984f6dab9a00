"""The command line. Commands import what they need when they run: ``unmask --help`` waits for no torch."""

from __future__ import annotations

import os
import sys

from unmask.errors import UnmaskError, cannot_write

_STOPPED = ("InterruptedRunError", "InterruptedCommandError", "SweepInterruptedError")


def main() -> None:
    """Entry point of ``unmask`` and ``python -m unmask``: refusals are one message on standard error, and exit status 1.

    Ctrl-C, at any moment, ends with a message too, and exit status 130.
    """
    try:
        _run()
    except UnmaskError as error:
        _end(str(error), 130 if type(error).__name__ in _STOPPED else 1)
    except KeyboardInterrupt:  # before a command began
        _end("interrupted before anything was done.", 130)
    except BrokenPipeError:  # what read the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        why = cannot_write(error)
        if why is None:
            raise
        _end(f"a file cannot be written ({why}). Free some space, or give another place.", 1)


def _run() -> None:
    try:
        from unmask.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click", "yaml"):
            raise
        sys.exit(f"unmask: {error.name!r} is not installed; the command line needs: pip install 'unmask[cli,hf,eval]'.")
    app(prog_name="unmask")


def _end(message: str, status: int) -> None:
    _say(message)
    sys.exit(status)


def _say(text: str) -> None:
    """Prints an error; under torchrun only the first process that has it does, and says which one it is."""
    rank = "0"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from unmask.distributed.processes import first_to_say

        if not first_to_say(text):
            return
        rank = os.environ.get("RANK", "0")
    print(f"unmask: {text}" if rank == "0" else f"unmask, process {rank}: {text}", file=sys.stderr, flush=True)


__all__ = ["main"]
