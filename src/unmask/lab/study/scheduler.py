"""Runs a sweep: submits the due runs to an engine, takes in their outcomes, and repeats a run whose worker died."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from rich.console import Console

from unmask.errors import ConfigError, UnmaskError
from unmask.lab.study.cells import Cell, distinct, expand
from unmask.lab.study.choosing import due
from unmask.lab.study.engine import Engine, Order, Outcome
from unmask.lab.study.live import LiveTable
from unmask.lab.study.local import LocalEngine, tail
from unmask.lab.study.spec import Sweep
from unmask.lab.study.store import Result, Results, Store
from unmask.lab.study.worker import FUNCTION

ATTEMPTS = 2
"""A run whose worker dies is started so many times in all, each time from its last checkpoint; then it has failed."""
BUSY_SECONDS = 2.0
"""Seconds after which the sweep asks again for a run that another command is making."""
SAVE_SECONDS = 300.0
"""Seconds that the runs under way get after Ctrl-C to finish their step and save a checkpoint."""

EngineName = Literal["local", "ray"]


class SweepInterruptedError(UnmaskError):
    """Says that Ctrl-C stopped the sweep. Finished runs are kept, and runs under way keep their last checkpoint."""


@dataclass(frozen=True)
class SweepReport:
    """The state of a sweep at its end.

    Attributes:
        cells: The cells of the whole grid.
        results: The results of the runs that have ended, by run id.
    """

    cells: tuple[Cell, ...]
    results: Results

    @property
    def failed(self) -> list[Result]:
        """The results of the runs that failed."""
        return [result for result in self.results.values() if result["status"] == "failed"]


def run_sweep(
    sweep: Sweep,
    store: Store,
    *,
    workers: int = 1,
    threads: int | None = None,
    devices: Sequence[str] = (),
    engine: EngineName = "local",
    function: str = FUNCTION,
    retry_failed: bool = False,
    console: Console | None = None,
    command: str = "",
    cells: Sequence[Cell] | None = None,
) -> SweepReport:
    """Makes all runs of a sweep that are not done yet.

    Several commands may work on one folder at the same time: each run is made once. A run whose worker dies is started
    once more and goes on from its last checkpoint; when that worker dies too, the run is recorded as failed. A run
    that raises an error is recorded as failed at once. The rules are the same for both engines. Workers of the local
    engine are spawned, so a script that calls this function needs ``if __name__ == "__main__":``.

    Args:
        sweep: The sweep.
        store: The sweep's folder.
        workers: How many runs are made at a time.
        threads: CPU threads of each run; None shares out the CPUs of the machine, or of the cluster.
        devices: CUDA device numbers, which the local engine gives to its workers in turn. Ray assigns devices itself.
        engine: ``"local"``: processes on this machine. ``"ray"``: tasks on a Ray cluster (extra ``ray``).
        function: ``package.module:function`` that makes a run from its settings and its output folder.
        retry_failed: True to make failed runs again.
        console: The console of the live table; None for standard output.
        command: The command line, for the record.
        cells: The expanded grid, if the caller has it.

    Raises:
        ConfigError: A setting cannot work, or the function cannot be imported.
        SweepInterruptedError: Ctrl-C stopped the sweep.
    """
    if workers < 1:
        raise ConfigError(f"workers = {workers}; there must be at least 1.")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads = {threads}; a worker needs at least 1.")
    if engine not in ("local", "ray"):
        raise ConfigError(f"engine = {engine!r}; it must be local or ray.")
    if engine == "ray" and devices:
        raise ConfigError(f"devices = {','.join(devices)}; Ray assigns GPUs itself, so leave devices out.")
    store.need_locks()
    cells = list(expand(sweep) if cells is None else cells)
    scheduler = _Scheduler(sweep, store, cells, workers, retry_failed, console or Console())
    store.write_plan(plan(sweep, cells, command))
    if engine == "ray":
        from unmask.lab.study.cluster import RayEngine

        return scheduler.run(RayEngine(store, function, workers, threads))
    shared_out = max(1, (os.cpu_count() or 1) // workers)
    return scheduler.run(LocalEngine(store, function, threads or shared_out, devices))


def plan(sweep: Sweep, cells: Sequence[Cell], command: str = "") -> dict[str, Any]:
    """Returns the content of ``sweep.json``: everything that a report needs and the results do not hold."""
    return {
        "name": sweep.name,
        "title": sweep.title,
        "notes": list(sweep.notes),
        "figures": list(sweep.figures),
        "claims": sweep.claims and dataclasses.asdict(sweep.claims),
        "choose": sweep.choice and dataclasses.asdict(sweep.choice),
        "protocol": dataclasses.asdict(sweep.protocol),
        "cells": [vars(cell) for cell in cells],
        "command": command,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class _Scheduler:
    """Decides which runs are submitted and when the sweep is over."""

    def __init__(
        self, sweep: Sweep, store: Store, cells: list[Cell], workers: int, retry_failed: bool, console: Console
    ) -> None:
        self._sweep, self._store, self._cells = sweep, store, cells
        self._workers, self._retry_failed = workers, retry_failed
        ids = {cell.id for cell in cells}
        known = {run: result for run, result in store.results().items() if run in ids}
        self._results = {
            run: result for run, result in known.items() if not (retry_failed and result["status"] == "failed")
        }
        self._under_way: dict[str, tuple[Cell, float]] = {}  # id -> (cell, the time of submission)
        self._deaths: Counter[str] = Counter()
        self._ask_again: dict[str, float] = {}  # id of a run that another command is making -> when to ask again
        self._live = LiveTable(sweep, cells, console, workers)

    def run(self, engine: Engine) -> SweepReport:
        """Makes all runs with an engine, and closes the engine."""
        try:
            with self._live.display:
                while self._submit_due(engine):
                    for outcome in engine.wait(0.5):
                        self._on_outcome(outcome)
        except KeyboardInterrupt:
            self._live.say("stopping: workers finish their step and save a checkpoint (Ctrl-C again: at once)")
            with contextlib.suppress(KeyboardInterrupt):
                engine.close(patience=SAVE_SECONDS)
            raise SweepInterruptedError(
                f"interrupted; {len(self._results)} runs are done, and those under way keep their last checkpoint. "
                "The same command goes on."
            ) from None
        finally:
            engine.close()
        return SweepReport(tuple(self._cells), dict(self._results))

    def _submit_due(self, engine: Engine) -> bool:
        """Submits due runs as long as workers are free; returns False when nothing is left to do."""
        wanted = distinct(due(self._cells, self._sweep.protocol, self._sweep.choice, self._results))
        waiting = [cell for cell in wanted if cell.id not in self._results and cell.id not in self._under_way]
        now = time.monotonic()
        for cell in [cell for cell in waiting if self._ask_again.get(cell.id, 0.0) <= now]:
            if len(self._under_way) == self._workers:
                break
            self._under_way[cell.id] = cell, now
            engine.submit(Order(cell, self._retry_failed))
        self._live.update(self._results, self._under_way.values())
        return bool(waiting or self._under_way)

    def _on_outcome(self, outcome: Outcome) -> None:
        cell, since = self._under_way.pop(outcome.id)
        if outcome.status == "busy":
            self._ask_again[cell.id] = time.monotonic() + BUSY_SECONDS
        elif outcome.status == "died":
            self._deaths[cell.id] += 1
            if self._deaths[cell.id] < ATTEMPTS:
                return
            error = {
                "type": "WorkerDied",
                "message": f"its worker died {ATTEMPTS} times ({outcome.cause}); perhaps there was too little memory",
                "traceback": tail(self._store.log_path(cell.id), 30),
            }
            died = {**vars(cell), "status": "failed", "error": error, "seconds": round(time.monotonic() - since, 2)}
            with self._store.lock(cell.id) as locked:
                if locked and self._store.result(cell.id) is None:
                    self._store.write_result(cell.id, died)
        result = self._store.result(cell.id)
        if result is not None and (outcome.status != "busy" or result["status"] == "done"):
            self._results[cell.id] = result
            self._live.ended(cell, result)
