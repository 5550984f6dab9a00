"""The timed part: rows interleaved in rounds, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unmask.bench.builders import build
from unmask.bench.contender import Contender
from unmask.bench.models import Batch, Blueprint
from unmask.bench.rows import Row
from unmask.bench.settings import BenchSettings
from unmask.bench.stats import StepTime


@dataclass
class RowResult:
    """What became of a row.

    Attributes:
        row: The row.
        status: ``"waiting"``, ``"ok"``, ``"not installed"``, ``"skipped"`` or ``"failed"``.
        reason: Why it is not ok.
        steps: Timed steps.
        facts: Counts of weights and whatever its builder found worth knowing.
        memory: Figures of the memory phase.
    """

    row: Row
    status: str = "waiting"
    reason: str | None = None
    steps: list[StepTime] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    def fail(self, error: BaseException) -> None:
        """Keeps the reason, drops the figures."""
        self.status, self.reason = "failed", _short(error)
        self.steps.clear()


def cycles_of(row: Row, settings: BenchSettings) -> int:
    """How many cycles a row runs in all, warm-up included."""
    return (settings.warmup + settings.rounds) * (1 if row.stride > 1 else settings.steps)


def rotated(labels: Sequence[str], round_: int) -> list[str]:
    """The order of a round: each starts one further, so that no row always follows the same one after a break.

    Example:
        >>> rotated(["a", "b", "c"], 4)
        ['b', 'c', 'a']
    """
    start = round_ % len(labels) if labels else 0
    return [*labels[start:], *labels[:start]]


def race(
    results: Sequence[RowResult],
    plan: Blueprint,
    settings: BenchSettings,
    group: int,
    after_round: Callable[[int], None],
) -> None:
    """Runs a group of rows: builds them, warms them up, times them. A row that fails is dropped, the rest goes on.

    Args:
        results: The rows' results, filled in place.
        plan: The model.
        settings: The run.
        group: The group's number, kept with each step.
        after_round: Called with the number of finished rounds, warm-up included.
    """
    contenders: dict[str, Contender] = {}
    batches = plan.batches()
    for result in results:
        with _guarded(result):
            contenders[result.row.label] = build(result.row, plan, settings, cycles_of(result.row, settings))
    by_label = {result.row.label: result for result in results}
    labels = list(contenders)
    for number in range(settings.warmup + settings.rounds):
        gc.collect()
        for label in rotated(labels, number):
            if label not in contenders:
                continue
            with _guarded(by_label[label]) as guard:
                steps = _stretch(contenders[label], batches, settings, group, number - settings.warmup)
                by_label[label].facts.update(_facts(contenders[label]))
                if number >= settings.warmup:
                    by_label[label].steps.extend(steps)
            if guard.failed:
                del contenders[label]
        after_round(number + 1)
    for label in contenders:
        by_label[label].status = "ok"


def _stretch(
    contender: Contender, batches: Sequence[Batch], settings: BenchSettings, group: int, round_: int
) -> list[StepTime]:
    """One row's steps of one round, with the garbage collector out of the way."""
    count = contender.row.cycle if contender.row.stride > 1 else settings.steps
    gc.disable()
    try:
        return [
            contender.step(batches[i % len(batches)], settings.dtype == "autocast", group, round_) for i in range(count)
        ]
    finally:
        gc.enable()


def _facts(contender: Contender) -> dict[str, Any]:
    return {**contender.facts, "trainable": contender.trainable, "trained": contender.trained()}


@dataclass
class _Guard:
    failed: bool = False


@contextlib.contextmanager
def _guarded(result: RowResult) -> Iterator[_Guard]:
    """A row's failure is its result; it ends no run."""
    guard = _Guard()
    try:
        yield guard
    except Exception as error:
        guard.failed = True
        result.fail(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
