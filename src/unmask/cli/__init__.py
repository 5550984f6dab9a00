"""The command line. Commands import what they need when they run: ``unmask --help`` waits for no torch."""

from __future__ import annotations

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
        print(f"unmask: {error}", file=sys.stderr)
        sys.exit(130 if type(error).__name__ == "InterruptedRunError" else 1)
    except KeyboardInterrupt:
        print("unmask: interrupted.", file=sys.stderr)
        sys.exit(130)


__all__ = ["main"]
