"""A worker process of a sweep: takes runs from its parent one by one, and dies with it.

The parent writes one JSON line per run to standard input and reads one line per run from what was standard output; what
a run prints goes into its log. When the parent is gone, standard input ends, and the worker stops at once: its
locks go with it, its checkpoint stays.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from unmask.errors import ConfigError
from unmask.lab.study.store import Result, Store

Runner = Callable[[Mapping[str, Any], Path], Mapping[str, Any]]
RUNNER = "unmask.lab.study.running:run_cell"


def load_runner(name: str) -> Runner:
    """The function ``package.module:function`` that does a run: ``(settings, folder) -> entries of the result``.

    Raises:
        ConfigError: There is none of that name.
    """
    module, _, function = name.partition(":")
    try:
        found: Runner = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"runner = {name!r} cannot be imported ({error}); write package.module:function.") from error
    return found


def do_run(store: Store, task: Mapping[str, Any], runner: Runner) -> str:
    """Does one run, unless it is done already or another process has it.

    Args:
        store: The sweep's folder.
        task: ``id``, ``settings``, ``labels``, and ``again`` to do a failed run again.
        runner: What does it.

    Returns:
        ``"done"``, ``"failed"``, ``"busy"`` (another process has it) or ``"interrupted"``.
    """
    run = str(task["id"])
    with store.lock(run) as mine:
        if not mine:
            return "busy"
        before = store.result(run)
        if before and (before["status"] == "done" or not task.get("again")):
            return str(before["status"])
        with _logged(store.log_path(run)):
            result = _attempt(runner, task, store.run_folder(run))
        if result is None:
            return "interrupted"
        store.write_result(run, result)
        return str(result["status"])


def _attempt(runner: Runner, task: Mapping[str, Any], folder: Path) -> Result | None:
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        entries: Mapping[str, Any] = {"status": "done", **runner(task["settings"], folder)}
    except KeyboardInterrupt:
        return None
    except Exception as error:
        if type(error).__name__ == "InterruptedRunError":  # of unmask.lab.training.training, which would import torch
            return None
        traceback.print_exc()
        entries = {"status": "failed", "error": describe_error(error)}
    return {
        "labels": dict(task["labels"]),
        "settings": dict(task["settings"]),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 2),
        "host": platform.node(),
        **entries,
    }


def describe_error(error: BaseException) -> dict[str, str]:
    """Type, message and traceback, for a failed run's result."""
    lines = traceback.format_exception(error)
    return {"type": type(error).__name__, "message": str(error), "traceback": "".join(lines)[-8000:]}


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Sends standard output and error, also those of C code, to the end of a file."""
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


def _listen(tasks: queue.Queue[dict[str, Any] | None], at_work: threading.Event) -> None:
    """Reads tasks; at the end of input the parent is gone, or wants no more."""
    held = b""
    while chunk := os.read(0, 65536):  # not sys.stdin, whose lock would be held at exit
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            at_work.set()  # here and not where it is taken, so that no task outlives the parent unseen
            tasks.put(json.loads(line))
    if at_work.is_set():
        os._exit(3)
    tasks.put(None)


def _serve(store: Store, runner: Runner, channel: TextIO) -> None:
    tasks: queue.Queue[dict[str, Any] | None] = queue.Queue()
    at_work = threading.Event()
    threading.Thread(target=_listen, args=(tasks, at_work), daemon=True).start()
    print(json.dumps({"status": "ready"}), file=channel, flush=True)
    while (task := tasks.get()) is not None:
        status = do_run(store, task, runner)
        at_work.clear()
        print(json.dumps({"id": task["id"], "status": status}), file=channel, flush=True)
        if status == "interrupted":
            return


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m unmask.lab.study``."""
    parser = argparse.ArgumentParser(prog="python -m unmask.lab.study")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--runner", default=RUNNER)
    parser.add_argument("--log", required=True)
    given = parser.parse_args(arguments)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    code = 0
    try:
        with _logged(Path(given.log)):
            _serve(Store(given.folder), load_runner(given.runner), channel)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        code = 1
        with contextlib.suppress(OSError):
            print(json.dumps({"status": "broken", "error": describe_error(error)}), file=channel, flush=True)
    os._exit(code)  # the listening thread may still be reading
