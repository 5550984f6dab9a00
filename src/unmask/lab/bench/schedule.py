"""The schedule that measures ID3 in the middle of a training run. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.lab.bench.rows import Row

# An ID3 row fills half of its budget in so many steps, one for each batch. All at once would take memory that no real run
# needs.
RAMP = 4
PLANNED_STEPS = 1_000  # The steps of the training run that is measured: each of them unmasks B / 1,000 weights.
_SHARE = 0.8  # The timed steps and the warm-up unmask at most this share of the budget.


@dataclass(frozen=True)
class MidRun:
    """A schedule b(t) that measures a method in the middle of a training run.

    A ramp of `RAMP` steps unmasks ``start`` weights. The warm-up and the timed steps after it run in cycles. The first step
    of each cycle unmasks as many weights as a stride of a run of 1,000 steps does, so that the timed steps have about half
    of the budget in use. If the stride is above 10, the cycle is shorter than the stride but unmasks as many weights.

    Attributes:
        cycle: The steps of a cycle.
        warmup: The steps between the ramp and the timed cycles; they begin with a cycle too.
        cycles: The number of cycles after the ramp, those of the warm-up included.
        start: The weights that the ramp unmasks.
        total: The weights that all cycles unmask together.
    """

    cycle: int
    warmup: int
    cycles: int
    start: int
    total: int

    def __call__(self, t: int, T: int, B: int) -> int:
        """Returns b(t), the weights that are unmasked by step t."""
        if t < RAMP:
            return max(1, self.start * (t + 1) // RAMP)
        after = t - RAMP
        if after < self.warmup:
            begun = after // self.cycle + 1
        else:
            begun = -(-self.warmup // self.cycle) + (after - self.warmup) // self.cycle + 1
        return min(B, self.start + self.total * begun // self.cycles)


def mid_run(row: Row, warmup: int, steps: int) -> MidRun:
    """Returns the schedule of an ID3 row, with so many steps of warm-up and at least so many timed steps.

    Example:
        >>> mid_run(Row("id3-10", "id3-10", 320_000), warmup=2, steps=3)
        MidRun(cycle=10, warmup=2, cycles=2, start=156800, total=6400)
    """
    cycles = row.cycles(warmup) + row.cycles(steps)
    planned = row.budget * row.stride * cycles // PLANNED_STEPS
    # Every cycle unmasks a weight, if the budget allows it.
    total = min(int(_SHARE * row.budget), max(cycles, planned))
    return MidRun(row.cycle, warmup, cycles, max(1, (row.budget - total) // 2), total)
