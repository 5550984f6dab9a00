"""unmask's own rows, and the schedule they are timed under."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unmask.lab.bench.contender import Contender, adamw
from unmask.lab.bench.models import Blueprint
from unmask.lab.bench.rows import Row
from unmask.methods.method import Method
from unmask.methods.presets import id3, random_mask, static_d3
from unmask.selection.select import select
from unmask.selection.selection import Selection

_PLANNED = 1_000  # steps of the training run that a timed stretch stands for: B / 1,000 weights are unmasked per step
_SHARE = 0.8  # at most this share of the budget is unmasked within the timed stretch


@dataclass(frozen=True)
class MidRun:
    """A schedule that starts in the middle of a run: about half of the budget is unmasked by the first step, or by a ramp.

    Then every cycle unmasks what a stride of the planned run does, so that the timed steps run with about B/2 slots in use.
    With a stride above 10 the timed cycle is shorter than the stride, but unmasks as much.

    Attributes:
        cycle: Steps of a timed cycle.
        cycles: How many there are.
        start: Unmasked by the first step, or in equal parts by the ramp.
        total: Unmasked by all the cycles after it.
        ramp: Steps before the cycles; 0: the first cycle's first step unmasks the start at once.
    """

    cycle: int
    cycles: int
    start: int
    total: int
    ramp: int = 0

    def __call__(self, t: int, T: int, B: int) -> int:
        """b(t)."""
        if t < self.ramp:
            return max(1, self.start * (t + 1) // self.ramp)
        taken = (t - self.ramp) // self.cycle + (1 if self.ramp else 0)
        return min(B, self.start + self.total * taken // self.cycles)


def mid_run(row: Row, cycles: int, ramp: int = 0) -> MidRun:
    """The schedule of a row that is to run so many cycles.

    Example:
        >>> mid_run(Row("id3-10", "id3-10", 320_000), cycles=6)
        MidRun(cycle=10, cycles=6, start=150400, total=19200, ramp=0)
    """
    planned = row.budget * row.stride * cycles // _PLANNED
    total = min(int(_SHARE * row.budget), max(cycles, planned))  # every cycle unmasks something, if the budget has it
    return MidRun(row.cycle, cycles, max(1, (row.budget - total) // 2), total, ramp)


def build_ours(row: Row, plan: Blueprint, cycles: int, ramp: int = 0) -> Contender:
    """A selection under the row's method, and AdamW on it.

    Args:
        row: One of unmask's rows.
        plan: The model.
        cycles: How many cycles will run, warm-up included.
        ramp: Steps of an ID3 row's ramp before those.
    """
    model = plan.build()
    selection = select(model, _method(row, plan.seed, cycles, ramp))
    return Contender(
        row,
        model,
        adamw(selection.parameters()),
        selection.budget,
        save=_saver(selection),
        used=lambda: selection.used,
        selection=selection,
    )


def _method(row: Row, seed: int, cycles: int, ramp: int) -> Method:
    if row.kind == "static":
        return random_mask(row.budget, seed)
    if row.kind == "static-d3":
        return static_d3(row.budget)
    steps = ramp + row.cycle * (cycles + 2)  # from there on the whole budget would be due
    return id3(row.budget, steps, schedule=mid_run(row, cycles, ramp))  # which goes up once in a cycle by itself


def _saver(selection: Selection) -> Callable[[Path], int]:
    return lambda folder: selection.delta().save(folder / "delta.safetensors").stat().st_size
