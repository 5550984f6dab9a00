"""The command line. Commands import what they need when they run: ``unmask --help`` waits for no torch."""

from __future__ import annotations

import os
import sys

from unmask.errors import UnmaskError


def main() -> None:
    """Entry point of the ``unmask`` console script: refusals are one message on standard error, and exit status 1."""
    try:
        from unmask.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click", "yaml"):
            raise
        sys.exit(f"unmask: {error.name!r} is not installed; the command line needs: pip install 'unmask[cli,hf,eval]'.")
    try:
        app()
    except UnmaskError as error:
        _say(str(error))
        sys.exit(130 if type(error).__name__ == "InterruptedRunError" else 1)
    except KeyboardInterrupt:
        print("unmask: interrupted.", file=sys.stderr)
        sys.exit(130)


def _say(text: str) -> None:
    """Prints an error; under torchrun only the first process that has it does, and says which one it is."""
    rank = "0"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from unmask.distributed.saying import first_to_say

        if not first_to_say(text):
            return
        rank = os.environ.get("RANK", "0")
    print(f"unmask: {text}" if rank == "0" else f"unmask, process {rank}: {text}", file=sys.stderr, flush=True)


__all__ = ["main"]
