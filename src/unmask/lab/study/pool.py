"""The worker processes of a sweep, as their parent sees them. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.lab.study.cells import Cell
from unmask.lab.study.store import Store

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(eq=False)
class Worker:
    """One process.

    Attributes:
        number: From 0.
        process: The process.
        cell: What it is at; None when it waits.
        since: When that began, on the monotonic clock.
        ready: Whether it has come up.
    """

    number: int
    process: subprocess.Popen[bytes]
    cell: Cell | None = None
    since: float = field(default_factory=time.monotonic)
    ready: bool = False

    def give(self, cell: Cell, again: bool) -> None:
        """Hands it a run."""
        self.cell, self.since = cell, time.monotonic()
        task = {"id": cell.id, "settings": dict(cell.settings), "labels": dict(cell.labels), "again": again}
        assert self.process.stdin is not None, "opened in start"
        with contextlib.suppress(BrokenPipeError):  # it died just now: its end of output is in the queue
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    @property
    def elapsed(self) -> float:
        """Seconds since it began its run."""
        return time.monotonic() - self.since


@dataclass(frozen=True)
class Event:
    """A worker's message; ``status`` is that of `unmask.lab.study.worker.do_run`, or ready, broken or gone."""

    worker: Worker
    status: str
    error: Mapping[str, Any] | None = None


class Pool:
    """Starts workers, hears from them, ends them.

    Args:
        store: The sweep's folder.
        runner: ``package.module:function``.
        threads: CPU threads of each.
        devices: Shared out to the workers in turn as ``CUDA_VISIBLE_DEVICES``; several can have the same one. None: as it is.
    """

    def __init__(self, store: Store, runner: str, threads: int, devices: Sequence[str] = ()) -> None:
        self._store, self._runner, self._threads, self._devices = store, runner, threads, tuple(devices)
        self.workers: list[Worker] = []
        self.events: queue.Queue[Event] = queue.Queue()
        self._started = 0

    def start(self) -> Worker:
        """A new worker, not ready yet."""
        number = self._started
        self._started += 1
        log = self._store.folder / "logs" / f"worker-{number}.log"
        command = [sys.executable, "-m", "unmask.lab.study", "--folder", str(self._store.folder)]
        process = subprocess.Popen(
            [*command, "--runner", self._runner, "--log", str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment(number),
            start_new_session=True,  # Ctrl-C goes to the parent alone, which passes it on
        )
        worker = Worker(number, process)
        self.workers.append(worker)
        threading.Thread(target=self._hear, args=(worker,), daemon=True).start()
        return worker

    def interrupt(self, patience: float = 300.0) -> None:
        """Ctrl-C for every worker: it finishes its step, saves a checkpoint and ends; `close` ends the impatient.

        Args:
            patience: Seconds to wait for each.
        """
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGINT)
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(patience)

    def remove(self, worker: Worker) -> int:
        """Forgets a worker whose output has ended; returns its exit status."""
        self.workers.remove(worker)
        _close(worker.process)
        return worker.process.wait()

    def close(self) -> None:
        """Ends all workers: those that wait at once, those at work by the end of their input."""
        for worker in self.workers:
            _close(worker.process)
        for worker in self.workers:
            try:
                worker.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self.workers.clear()

    def _hear(self, worker: Worker) -> None:
        assert worker.process.stdout is not None, "opened in start"
        with worker.process.stdout as stream:
            for line in stream:
                message = json.loads(line)
                self.events.put(Event(worker, message["status"], message.get("error")))
        self.events.put(Event(worker, "gone"))

    def _environment(self, number: int) -> dict[str, str]:
        environment = os.environ | dict.fromkeys(THREADS, str(self._threads))
        environment["PYTHONPATH"] = os.pathsep.join(
            path for path in sys.path if path
        )  # as here, however that came about
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[number % len(self._devices)]
        return environment


def _close(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):
        if process.stdin is not None:
            process.stdin.close()


def default_threads(workers: int) -> int:
    """The machine's cores shared out."""
    return max(1, (os.cpu_count() or 1) // workers)


def tail(path: Path, lines: int = 5) -> str:
    """The last lines of a log; empty if there is none."""
    if not path.is_file():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
