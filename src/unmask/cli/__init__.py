"""The command line. A command imports what it needs when it runs, so that ``unmask --help`` does not wait for torch."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

from unmask.errors import UnmaskError, cannot_write

_CHATTY = (
    "torchao",
    "bitsandbytes",
    "torch.utils._pytree",
)  # peft imports these; they warn about each lacking GPU library
_STOPPED = ("InterruptedRunError", "InterruptedCommandError", "SweepInterruptedError")


def main() -> None:
    """Runs ``unmask`` and ``python -m unmask``. A refusal ends with one message on standard error and exit status 1.

    Ctrl-C, at any moment, ends with a message and exit status 130.
    """
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        try:
            from unmask.cli.app import app
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("typer", "rich", "click", "yaml"):
                raise
            sys.exit(
                f"unmask: {error.name!r} is not installed; the command line needs: pip install 'unmask[cli,hf,eval]'."
            )
        app(prog_name="unmask")
    except UnmaskError as error:
        _end(str(error), 130 if type(error).__name__ in _STOPPED else 1)
    except KeyboardInterrupt:  # before a command began
        _end("interrupted before anything was done.", 130)
    except BrokenPipeError:  # the program that reads the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        why = cannot_write(error)
        if why is None:
            raise
        _end(f"a file cannot be written ({why}). Free some space, or give another place.", 1)


def _as_typed(message: str) -> str:
    """Names a setting at the start of an error as the user typed it: ``--seed -3`` for ``seed = -3``."""
    name = message.split(" = ")[0].split(": ")[0]
    flag = f"--{name.replace('_', '-')}"
    if not name.isidentifier() or all(word.split("=")[0] != flag for word in sys.argv):
        return message
    return flag + message.removeprefix(name).replace(" = ", " ", 1)


def _end(message: str, status: int) -> NoReturn:
    """Prints an error and ends. Under torchrun only the first process that has the error prints it, with its rank."""
    message, process = _as_typed(message), ""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from unmask.distributed.processes import first_to_say

        if not first_to_say(message):
            sys.exit(status)
        process = "" if os.environ.get("RANK", "0") == "0" else f", process {os.environ['RANK']}"
    print(f"unmask{process}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
