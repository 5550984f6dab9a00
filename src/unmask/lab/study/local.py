"""Makes a sweep's runs in worker processes on this machine."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from unmask.errors import ConfigError
from unmask.lab.study.engine import THREAD_VARIABLES, Order, Outcome
from unmask.lab.study.store import Store
from unmask.lab.study.worker import load_function, logged, make_run

_READY = "ready"


@dataclass(eq=False)
class Worker:
    """The state of one worker process, as its parent sees it.

    Attributes:
        log: The file to which its output is printed.
        process: The process.
        connection: The parent's end: orders go out, outcomes come in.
        order: The order that it executes; None while it waits.
        ready: True once it has imported what makes the runs.
    """

    log: Path
    process: SpawnProcess
    connection: Connection
    order: Order | None = None
    ready: bool = False


class LocalEngine:
    """Starts a worker process when an order finds none free. A worker stays alive for further runs.

    Each worker gets one of the CUDA device numbers in turn as ``CUDA_VISIBLE_DEVICES``, so several workers can share
    one. Without any, all workers see all devices.
    """

    def __init__(self, store: Store, function: str, threads: int, devices: Sequence[str] = ()) -> None:
        self._store, self._function, self._threads, self._devices = store, function, threads, tuple(devices)
        self._workers: list[Worker] = []
        self._numbers = itertools.count()

    def submit(self, order: Order) -> None:
        """Gives the order to a free worker, or to a new one."""
        worker = next((worker for worker in self._workers if worker.order is None), None)
        if worker is None:
            number, context = next(self._numbers), multiprocessing.get_context("spawn")
            log = self._store.log_path(f"worker-{number}")
            ours, theirs = context.Pipe()
            arguments = (theirs, self._store.folder, self._function, log)
            process = context.Process(target=_serve, args=arguments, name=f"sweep-{number}")
            environment = dict.fromkeys(THREAD_VARIABLES, str(self._threads))
            if self._devices:
                environment["CUDA_VISIBLE_DEVICES"] = self._devices[number % len(self._devices)]
            with _environment(environment):  # It must be set before the worker imports torch.
                process.start()
            theirs.close()
            worker = Worker(log, process, ours)
            self._workers.append(worker)
        worker.order = order
        with contextlib.suppress(BrokenPipeError):  # The worker has just died; `wait` reports it.
            worker.connection.send(order)

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Returns the orders that have ended; see `unmask.lab.study.engine.Engine.wait`."""
        found = wait([end for worker in self._workers for end in (worker.connection, worker.process.sentinel)], timeout)
        outcomes = []
        for worker in list(self._workers):
            try:
                message = worker.connection.recv() if worker.connection in found else None
            except (EOFError, ConnectionResetError):
                outcomes += self._on_worker_death(worker)
                continue
            if isinstance(message, ConfigError):
                raise ConfigError(f"a worker cannot make runs: {message}")
            if message == _READY:
                worker.ready = True
            elif message is not None:
                worker.order = None
                outcomes.append(message)
                if message.status == "interrupted":  # Such a worker ends itself.
                    self._on_worker_death(worker)
            elif worker.process.sentinel in found:
                outcomes += self._on_worker_death(worker)
        return outcomes

    def close(self, patience: float = 0.0) -> None:
        """Ends all workers; see `unmask.lab.study.engine.Engine.close`."""
        until = time.monotonic() + max(patience, 10.0)
        for worker in self._workers:
            if worker.order is None:
                worker.connection.close()  # The worker reads the end of its orders and returns.
            elif patience and worker.process.pid and worker.process.is_alive():
                os.kill(worker.process.pid, signal.SIGINT)
            else:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _on_worker_death(self, worker: Worker) -> list[Outcome]:
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        code = worker.process.exitcode or 0
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        if not worker.ready:
            raise ConfigError(f"a worker cannot start ({cause}); its log {str(worker.log)!r} ends: {tail(worker.log)}")
        return [Outcome(worker.order.cell.id, "died", cause)] if worker.order else []


def _serve(connection: Connection, folder: Path, function: str, log: Path) -> None:
    """Runs in the worker process: executes orders until there are no more, or until the parent process is gone."""
    os.setsid()  # Ctrl-C in the terminal reaches the parent alone, which passes it on.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = Store(folder)
    with logged(log), contextlib.suppress(EOFError, KeyboardInterrupt):
        try:
            make = load_function(function)
            connection.send(_READY)
            while True:
                outcome = make_run(store, connection.recv(), make)
                connection.send(outcome)
                if outcome.status == "interrupted":
                    return
        except ConfigError as error:
            traceback.print_exc()
            connection.send(error)


def _end_with_parent() -> None:
    """Ends this process at once when its parent ends. The lock of its run goes with it; the checkpoints stay."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "This runs in a worker."
    wait([parent.sentinel])
    os._exit(3)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables inside the block; a process that starts there inherits them."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


def tail(path: Path, lines: int = 5) -> str:
    """Returns the last lines of a log; the text is empty if there is no log."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return "\n".join(text.splitlines()[-lines:])
