"""The part of a sweep that runs in a worker process: one order becomes one result in the store. It imports no torch."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.lab.study.cells import Cell
from unmask.lab.study.engine import Order, Outcome
from unmask.lab.study.store import Result, Store

Function = Callable[[Mapping[str, Any], Path], Mapping[str, Any]]
"""A function ``(settings, folder) -> entries of the result`` that makes a run in its folder."""
FUNCTION = "unmask.lab.study.train_cell:train_cell"


def load_function(name: str) -> Function:
    """Imports the function ``package.module:function`` that makes a run.

    Raises:
        ConfigError: There is no such function.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"function = {name!r} cannot be imported ({error}); write package.module:function."
        ) from error
    return found


def make_run(store: Store, order: Order, function: Function) -> Outcome:
    """Makes one run and writes its result, unless the result is there already or another process is making the run."""
    run = order.cell.id
    with store.lock(run) as locked:
        if not locked:
            return Outcome(run, "busy")
        before = store.result(run)
        if before and (before["status"] == "done" or not order.retry_failed):
            return Outcome(run, before["status"])
        with logged(store.log_path(run)):
            result = _attempt(order.cell, function, store.output_path(run))
        if result is None:
            return Outcome(run, "interrupted")
        store.write_result(run, result)
        return Outcome(run, result["status"])


def _attempt(cell: Cell, function: Function, folder: Path) -> Result | None:
    """Returns the result, also of a run that raises an error; None for a run that was interrupted."""
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        entries: Mapping[str, Any] = {"status": "done", **function(cell.settings, folder)}
    except KeyboardInterrupt:
        return None
    except Exception as error:
        if type(error).__name__ == "InterruptedRunError":  # The class itself is in a module that imports torch.
            return None
        traceback.print_exc()
        trace = "".join(traceback.format_exception(error))[-8000:]
        failure = {"type": type(error).__name__, "message": str(error), "traceback": trace}
        entries = {"status": "failed", "error": failure}
    return {
        **vars(cell),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 2),
        "host": platform.node(),
        **entries,
    }


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Appends standard output and standard error, also those of C code, to a file inside the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, source in enumerate(kept, start=1):
            os.dup2(source, target)
            os.close(source)
