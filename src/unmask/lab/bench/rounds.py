"""The timed part: rows interleaved in rounds, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unmask.lab.bench.lanes import Lane, LaneError
from unmask.lab.bench.processes import short
from unmask.lab.bench.rows import Row
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.stats import StepTime


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
        self.status, self.reason = "failed", str(error) if isinstance(error, LaneError) else short(error)
        self.steps.clear()


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
    start: Callable[[Row], Lane],
    settings: BenchSettings,
    group: int,
    after_round: Callable[[], None],
    draw: int = 0,
) -> None:
    """Runs a group of rows once: builds them, warms them up, times them. A row that fails is dropped, the rest goes on.

    Args:
        results: The rows' results, filled in place.
        start: Makes a row ready.
        settings: The run.
        group: The group's number, kept with each step.
        after_round: Called after every round, warm-up included.
        draw: How many times the group has run before. Rows that failed then are left out.
    """
    lanes: dict[str, Lane] = {}
    results = [result for result in results if not (draw and result.status == "failed")]
    try:
        for result in results:
            with _guarded(result):
                lanes[result.row.label] = start(result.row)
        _rounds({result.row.label: result for result in results}, lanes, settings, group, after_round, draw)
    finally:
        for lane in lanes.values():
            lane.close()


def _rounds(
    by_label: dict[str, RowResult],
    lanes: dict[str, Lane],
    settings: BenchSettings,
    group: int,
    after_round: Callable[[], None],
    draw: int,
) -> None:
    labels = list(lanes)
    for number in range(settings.warmup + settings.rounds):
        warm = number < settings.warmup
        for label in rotated(labels, draw + number):
            if label not in lanes:
                continue
            with _guarded(by_label[label]) as guard:
                steps = lanes[label].stretch(group, draw * settings.rounds + number - settings.warmup)
                by_label[label].facts.update(lanes[label].facts())
                if not warm:
                    by_label[label].steps.extend(steps)
            if guard.failed:
                lanes.pop(label).close()
        after_round()
    for label in lanes:
        by_label[label].status = "ok"


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
