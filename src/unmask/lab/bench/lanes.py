"""Where a row's timed steps run: in a process of its own, as a user's training does, or in this one.

A row's process builds the row, then runs a stretch of steps whenever it is told to, so that rows are interleaved all the
same. It is run as ``python -m unmask.lab.bench.lanes SETTINGS LABEL``; words go over its standard input and output,
a line of JSON each.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from unmask.errors import UnmaskError
from unmask.lab.bench.builders import build
from unmask.lab.bench.models import Batch, Blueprint, blueprint
from unmask.lab.bench.processes import command, ending, environment, heard, say, short, told
from unmask.lab.bench.quiet import import_peers, quiet_torch
from unmask.lab.bench.rows import Row
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.stats import StepTime

_MARK = "unmask-bench-lane:"


class Lane(Protocol):
    """A row that is ready to run."""

    def stretch(self, group: int, round_: int) -> list[StepTime]:
        """Runs its steps of one round."""

    def facts(self) -> dict[str, Any]:
        """What is known of the row by now: counts of weights, and whatever its builder found worth knowing."""

    def close(self) -> None:
        """Lets go of it."""


class LocalLane:
    """A row in this process."""

    def __init__(self, row: Row, plan: Blueprint, batches: Sequence[Batch], settings: BenchSettings) -> None:
        self._contender = build(row, plan, settings, cycles_of(row, settings))
        self._batches, self._autocast = batches, settings.dtype == "autocast"
        self._steps = row.cycle if row.stride > 1 else settings.steps

    def stretch(self, group: int, round_: int) -> list[StepTime]:
        """Runs the steps of one round, with the garbage collector out of the way."""
        gc.collect()
        gc.disable()
        try:
            return [
                self._contender.step(self._batches[i % len(self._batches)], self._autocast, group, round_)
                for i in range(self._steps)
            ]
        finally:
            gc.enable()

    def facts(self) -> dict[str, Any]:
        contender = self._contender
        return {**contender.facts, "trainable": contender.trainable, "trained": contender.trained()}

    def close(self) -> None:
        del self._contender


class RemoteLane:
    """A row in a process of its own.

    Raises:
        LaneError: The process ended, or could not build the row.
    """

    def __init__(self, row: Row, settings: BenchSettings) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(  # type: ignore[call-overload]
            command("unmask.lab.bench.lanes", settings, row), text=True, env=environment(settings), **pipes
        )
        self._facts: dict[str, Any] = {}
        try:
            self._hear()
        except BaseException:
            self.close()
            raise

    def stretch(self, group: int, round_: int) -> list[StepTime]:
        self._process.stdin.write(json.dumps([group, round_]) + "\n")
        self._process.stdin.flush()
        return [StepTime(**step) for step in self._hear()["steps"]]

    def facts(self) -> dict[str, Any]:
        return self._facts

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _hear(self) -> dict[str, Any]:
        for line in self._process.stdout:
            said = heard(_MARK, line)
            if said is None:
                continue
            if "error" in said:
                raise LaneError(said["error"])
            self._facts = said["facts"]
            return said
        raise LaneError(ending(self._process.wait()))


class LaneError(UnmaskError):
    """A row's process could not go on."""


def cycles_of(row: Row, settings: BenchSettings) -> int:
    """How many cycles a row runs in all, warm-up included."""
    return (settings.warmup + settings.rounds) * (1 if row.stride > 1 else settings.steps)


def main() -> None:
    """The entry of a row's process."""
    settings, row = told(sys.argv)
    import_peers()
    try:
        with quiet_torch(settings.threads):
            plan = blueprint(settings)
            lane = LocalLane(row, plan, plan.batches(), settings)
            say(_MARK, {"facts": lane.facts()})
            for line in sys.stdin:
                group, round_ = json.loads(line)
                steps = [vars(step) for step in lane.stretch(group, round_)]
                say(_MARK, {"steps": steps, "facts": lane.facts()})
    except Exception as error:
        say(_MARK, {"error": short(error)})


if __name__ == "__main__":
    main()
