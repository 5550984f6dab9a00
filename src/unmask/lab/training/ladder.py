"""Keeps the deltas of growing budgets along a run of ``unmask train``, and writes them as one `unmask.Ladder`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from unmask.delta.delta import SparseDelta
from unmask.delta.ladder import Ladder
from unmask.files import discard
from unmask.lab.training.run_folder import RunFolder
from unmask.lab.training.setup import Setup
from unmask.methods.method import Method


def rung_steps(method: Method, budget: int, steps: int, rungs: int) -> list[int]:
    """Returns the steps after which a run keeps a rung; the last is the run's last step.

    Where the budget is unmasked step by step, rung k of n is kept as soon as k / n of the budget is unmasked. Otherwise the
    rungs are evenly spread over the steps. Fewer steps than rungs give fewer rungs.

    Example:
        >>> import unmask
        >>> rung_steps(unmask.id3(100, steps=20), 100, 20, 4), rung_steps(unmask.pafi(100), 100, 20, 4)
        ([5, 10, 15, 20], [5, 10, 15, 20])
        >>> rung_steps(unmask.id3(100, steps=20, schedule="front-loaded"), 100, 20, 4)
        [2, 5, 8, 20]
    """
    if method.strategy == "increment":
        due = [-(-k * budget // rungs) for k in range(1, rungs)]
        found = [next(t + 1 for t in range(steps) if method.cumulative(t, budget) >= each) for each in due]
    else:
        found = [round(k * steps / rungs) for k in range(1, rungs)]
    return sorted({*(step for step in found if 0 < step < steps), steps})


class RungFiles(TrainerCallback):
    """Writes a delta after each step of a rung, and the ladder of all at the end. A resumed run finds those that it has written.

    Attributes:
        steps: The steps of the rungs; the run's own delta is the last rung.
    """

    def __init__(self, setup: Setup, folder: RunFolder, rungs: int) -> None:
        self._setup, self._folder = setup, folder
        self.steps = rung_steps(setup.selection.method, setup.selection.budget, setup.steps, rungs)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps[:-1]:
            self._folder.rungs.mkdir(exist_ok=True)
            self._setup.delta().save(self._folder.rung_file(state.global_step))

    def finish(self, delta: SparseDelta) -> Path:
        """Writes the ladder, whose last rung is the run's delta, and removes the files of the other rungs."""
        path = Ladder([*map(self._rung, self.steps[:-1]), delta]).save(self._folder.ladder)
        discard(self._folder.rungs)
        return path

    def _rung(self, step: int) -> SparseDelta:
        """Reads the rung of a step. If a finished run has lost another file, its rungs are in the ladder alone."""
        file, ladder = self._folder.rung_file(step), self._folder.ladder
        if file.is_file() or not ladder.is_file():
            return SparseDelta.load(file)
        return Ladder.load(ladder).rungs[self.steps.index(step)]
