"""Runs a sweep: hands due runs to workers, takes in what they report, goes on after any end. No torch here."""

from __future__ import annotations

import dataclasses
import queue
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from unmask.errors import ConfigError, UnmaskError
from unmask.lab.study.cells import Cell, expand, runs
from unmask.lab.study.choosing import due
from unmask.lab.study.live import LiveTable
from unmask.lab.study.pool import Event, Pool, Worker, default_threads, tail
from unmask.lab.study.spec import Sweep
from unmask.lab.study.store import Result, Store
from unmask.lab.study.worker import RUNNER

ATTEMPTS = 2  # of a run whose worker dies: once more from its checkpoint, then it counts as failed
ELSEWHERE = 2.0  # seconds until a run that another process has is asked for again


class SweepInterruptedError(UnmaskError):
    """The sweep was stopped by Ctrl-C; what is done is kept, what was running keeps its last checkpoint."""


@dataclass(frozen=True)
class Report:
    """How a sweep ended.

    Attributes:
        cells: The whole grid.
        results: Of the runs that have ended, by id.
    """

    cells: tuple[Cell, ...]
    results: Mapping[str, Result]

    @property
    def failed(self) -> list[Result]:
        """Results of the runs that failed."""
        return [result for result in self.results.values() if result["status"] == "failed"]


def run_sweep(
    sweep: Sweep,
    store: Store,
    *,
    workers: int = 1,
    threads: int | None = None,
    devices: Sequence[str] = (),
    runner: str = RUNNER,
    retry_failed: bool = False,
    console: Console | None = None,
    command: str = "",
    cells: Sequence[Cell] | None = None,
) -> Report:
    """Does all runs of a sweep that are not done yet.

    Several commands may work on one folder at a time: each run is done once.

    Args:
        sweep: The sweep.
        store: Its folder.
        workers: Processes.
        threads: CPU threads of each; None shares out the cores.
        devices: See `Pool`.
        runner: ``package.module:function`` that does a run, for tests and other trainings.
        retry_failed: Do failed runs again.
        console: Where the live table goes; None for standard output.
        command: For the record.
        cells: The grid, if it has been expanded.

    Raises:
        ConfigError: A setting that cannot work, or a runner that cannot be imported.
        SweepInterruptedError: Ctrl-C.
    """
    if workers < 1:
        raise ConfigError(f"workers = {workers}; there must be at least 1.")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads = {threads}; a worker needs at least 1.")
    cells = list(expand(sweep) if cells is None else cells)
    pool = Pool(store, runner, threads or default_threads(workers), devices)
    work = _Work(sweep, store, cells, pool, workers, retry_failed, console or Console())
    store.write_plan(plan(sweep, cells, command))
    return work.go()


def plan(sweep: Sweep, cells: Sequence[Cell], command: str = "") -> dict[str, Any]:
    """What ``sweep.json`` holds: all that a report needs beside the results."""
    choice, protocol = sweep.choice, sweep.protocol
    return {
        "name": sweep.name,
        "title": sweep.title,
        "notes": list(sweep.notes),
        "figures": list(sweep.figures),
        "claims": None if sweep.claims is None else dataclasses.asdict(sweep.claims),
        "choose": None if choice is None else {**vars(choice), "seeds": list(choice.seeds)},
        "protocol": vars(protocol).copy(),
        "cells": [{"id": c.id, "labels": dict(c.labels), "settings": dict(c.settings)} for c in cells],
        "command": command,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class _Work:
    """A sweep under way."""

    def __init__(
        self,
        sweep: Sweep,
        store: Store,
        cells: list[Cell],
        pool: Pool,
        workers: int,
        again: bool,
        console: Console,
    ) -> None:
        self.sweep, self.store, self.cells, self.pool, self.again = sweep, store, cells, pool, again
        self.wanted = workers
        mine = {cell.id for cell in cells}
        self.results = {
            run: result
            for run, result in store.results().items()
            if run in mine and not (again and result["status"] == "failed")
        }
        self.deaths: dict[str, int] = {}
        self.elsewhere: dict[str, float] = {}  # run -> when to ask again
        self.live = LiveTable(self.cells, sweep.protocol, sweep.choice, console, workers)

    def go(self) -> Report:
        try:
            with self.live:
                while self._hand_out():
                    self._take_in()
        except KeyboardInterrupt:
            self._stop()
            raise SweepInterruptedError(
                f"interrupted; {len(self.results)} runs are done, and those under way keep their last checkpoint. "
                "The same command goes on."
            ) from None
        finally:
            self.pool.close()
        return Report(tuple(self.cells), dict(self.results))

    def _hand_out(self) -> bool:
        """Gives due runs to waiting workers; False when nothing is left to do."""
        taken = {worker.cell.id for worker in self.pool.workers if worker.cell}
        ended_or_taken = self.results.keys() | taken
        wanted = due(self.cells, self.sweep.protocol, self.sweep.choice, self.results)
        waiting = [cell for cell in runs(wanted) if cell.id not in ended_or_taken]
        now = time.monotonic()
        ready = [cell for cell in waiting if self.elsewhere.get(cell.id, 0.0) <= now]
        for worker in self.pool.workers:
            if worker.ready and worker.cell is None and ready:
                worker.give(ready.pop(0), self.again)
        coming = sum(not worker.ready for worker in self.pool.workers)
        for _ in range(min(self.wanted - len(self.pool.workers), len(ready) - coming)):
            self.pool.start()
        self.live.update(self.results, self.pool.workers)
        return bool(waiting or taken)

    def _take_in(self) -> None:
        try:
            event = self.pool.events.get(timeout=0.5)
        except queue.Empty:
            return
        worker = event.worker
        if event.status == "ready":
            worker.ready = True
        elif event.status == "broken" and not worker.ready:
            raise ConfigError(f"a worker cannot start: {(event.error or {}).get('message')}")
        elif event.status in ("gone", "broken"):
            self._mourn(event)
        else:
            self._hear(worker, event.status)

    def _hear(self, worker: Worker, status: str) -> None:
        cell, worker.cell = worker.cell, None
        if cell is None:
            return
        if status == "busy":
            self.elsewhere[cell.id] = time.monotonic() + ELSEWHERE
        result = self.store.result(cell.id)
        if result is not None and (status != "busy" or result["status"] == "done"):
            self.results[cell.id] = result
            self.live.ended(cell, result)

    def _mourn(self, event: Event) -> None:
        """A worker has died, perhaps for want of memory: its run is tried once more, then recorded as failed."""
        worker = event.worker
        if event.status == "broken" or worker not in self.pool.workers:
            return  # its end of output follows, or was seen
        code = self.pool.remove(worker)
        if not worker.ready:
            log = self.store.folder / "logs" / f"worker-{worker.number}.log"
            raise ConfigError(f"a worker cannot start ({_cause(code)}); its log {str(log)!r} ends: {tail(log)}")
        cell = worker.cell
        if cell is None:
            return
        self.deaths[cell.id] = self.deaths.get(cell.id, 0) + 1
        if self.deaths[cell.id] < ATTEMPTS:
            return
        self._record_death(worker, cell, code)
        self._hear(worker, "failed")

    def _record_death(self, worker: Worker, cell: Cell, code: int) -> None:
        message = f"its worker died {ATTEMPTS} times ({_cause(code)}), perhaps for want of memory"
        error = {"type": "WorkerDied", "message": message, "traceback": tail(self.store.log_path(cell.id), 30)}
        result = {"status": "failed", "error": error, "seconds": round(worker.elapsed, 2)}
        with self.store.lock(cell.id) as mine:
            if mine and self.store.result(cell.id) is None:
                self.store.write_result(
                    cell.id, {"labels": dict(cell.labels), "settings": dict(cell.settings), **result}
                )

    def _stop(self) -> None:
        """Passes Ctrl-C on and waits for the checkpoints; a second Ctrl-C ends the workers at once."""
        self.live.say("stopping: workers finish their step and save a checkpoint (Ctrl-C again: at once)")
        try:
            self.pool.interrupt()
        except KeyboardInterrupt:
            for worker in self.pool.workers:
                worker.process.kill()


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
