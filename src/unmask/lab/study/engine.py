"""The protocol between a sweep, which decides what is run, and an engine, which decides where it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from unmask.lab.study.cells import Cell

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Order:
    """The request to make the run of a cell. With ``retry_failed`` a run whose result says "failed" is made again."""

    cell: Cell
    retry_failed: bool = False


@dataclass(frozen=True)
class Outcome:
    """The end of one order.

    Attributes:
        id: The run's id.
        status: ``"done"`` or ``"failed"``: the run's result is in the store. ``"busy"``: another command is making the
            run. ``"interrupted"``: the run saved a checkpoint and stopped. ``"died"``: the worker process ended during
            the run.
        cause: How the worker died, such as ``"SIGKILL"``; empty otherwise.
    """

    id: str
    status: Literal["done", "failed", "busy", "interrupted", "died"]
    cause: str = ""


class Engine(Protocol):
    """Executes orders in worker processes. It neither chooses runs nor repeats them: the sweep does both.

    An engine dies with the process that made it: no run goes on without its sweep.
    """

    def submit(self, order: Order) -> None:
        """Starts a run, or queues it until a worker is free; returns at once."""

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Returns the orders that have ended since the last call; waits up to ``timeout`` seconds for the first one.

        Raises:
            ConfigError: A worker cannot start, or it cannot make runs.
        """

    def close(self, patience: float = 0.0) -> None:
        """Ends all workers; the runs under way get so many seconds to save a checkpoint. It may be called again."""
