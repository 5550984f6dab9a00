"""Unmasking schedules ``b(t, T, B)``: how many weights are unmasked once step t (from 0) of T has selected, of a budget B."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from unmask.errors import MethodError
from unmask.reading import choices

Cumulative = Callable[[int, int, int], int]

MOST_STEPS = 10**12
"""The largest T that is planned for."""
MOST_WALKED = 10**7
"""The largest number of selecting steps for a schedule that is checked step by step before training (some seconds)."""


def uniform(t: int, T: int, B: int) -> int:
    """Returns ``b(t) = B (t + 1) // T``, the paper's schedule. With B < T some steps unmask nothing.

    Example:
        >>> [uniform(t, 4, 10) for t in range(4)]
        [2, 5, 7, 10]
    """
    return B * (t + 1) // T


def cosine(t: int, T: int, B: int) -> int:
    """Returns ``b(t) = B (1 - cos(pi s)) / 2`` with ``s = (t + 1) / T``: slow, then fast, then slow.

    Example:
        >>> [cosine(t, 4, 100) for t in range(4)]
        [14, 50, 85, 100]
    """
    return B if t + 1 >= T else int(B * (1 - math.cos(math.pi * (t + 1) / T)) / 2 + 1e-9)


def front_loaded(t: int, T: int, B: int) -> int:
    """Returns ``b(t) = B (1 - (1 - s)^3)`` with ``s = (t + 1) / T``, in integers: most of the budget comes early.

    The cubic curve is that of gradual pruning (arXiv 1710.01878).

    Example:
        >>> [front_loaded(t, 4, 64) for t in range(4)]
        [37, 56, 63, 64]
    """
    return B - -(-B * (T - t - 1) ** 3 // T**3)


def at_once(t: int, T: int, B: int) -> int:
    """Returns ``b(t) = B``: the whole budget at the first step, as in a static selection."""
    return B


SCHEDULES: dict[str, Cumulative] = {
    "uniform": uniform,
    "cosine": cosine,
    "front-loaded": front_loaded,
    "at-once": at_once,
}
# These compute in integers, so that b(t) cannot decrease and lies in 0..B; `Schedule.check` need not walk through them.
_NEVER_DOWN = (uniform, front_loaded, at_once)


@dataclass(frozen=True)
class Schedule:
    """A schedule bound to its number of steps and its stride. Step t unmasks ``u_t = b(t) - b(t - 1)`` weights.

    From step ``T - 1`` on the budget is always exact, ``b(t) = B``, also if the function returns less there.

    Attributes:
        function: The function ``b(t, T, B)``, from this module or your own.
        steps: T, the planned number of optimizer steps, at least 1.
        stride: k. Every k-th step (t = 0, k, 2k, ...) unmasks as much as k steps would, and the steps in between nothing.

    Raises:
        MethodError: The function is not callable, or steps or stride are below 1 or above `MOST_STEPS`.
    """

    function: Cumulative
    steps: int
    stride: int = 1

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise MethodError(f"the schedule {self.function!r:.80} is not callable; give a callable b(t, T, B).")
        for name, value in (("steps", self.steps), ("stride", self.stride)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MethodError(f"{name} = {value!r:.80}; it must be a whole number, at least 1.")
            if value > MOST_STEPS:
                raise MethodError(
                    f"{name} = {value!r:.80}; it must be at most {MOST_STEPS:,}. Give T, the number of optimizer steps."
                )

    @classmethod
    def of(cls, which: str | Cumulative, steps: int, stride: int = 1) -> Schedule:
        """Builds a schedule from a key of `SCHEDULES`, or a callable b(t, T, B).

        Raises:
            MethodError: The name is not known, or a number is not allowed.

        Example:
            >>> Schedule.of(lambda t, T, B: B // 2, steps=3).cumulative(0, 10)
            5
        """
        if isinstance(which, str):
            if which not in SCHEDULES:
                raise MethodError(
                    f"unknown schedule {which!r:.80}; there are {choices(which, SCHEDULES)}, or give a callable b(t, T, B)."
                )
            which = SCHEDULES[which]
        return cls(which, steps, stride)

    @property
    def name(self) -> str:
        """The function's name, or its type's where it has none.

        Example:
            >>> Schedule(uniform, 3).name
            'uniform'
        """
        return getattr(self.function, "__name__", type(self.function).__name__)

    def cumulative(self, t: int, budget: int) -> int:
        """Returns b(t), the number of weights unmasked after step t has selected; ``b(-1) = 0``.

        Raises:
            MethodError: The function returned something other than a whole number in 0..B.

        Example:
            >>> [Schedule(uniform, steps=6, stride=3).cumulative(t, 12) for t in range(-1, 7)]
            [0, 6, 6, 6, 12, 12, 12, 12]
        """
        if t < 0:
            return 0
        last_of_block = (t // self.stride + 1) * self.stride - 1
        if last_of_block >= self.steps - 1:
            return budget
        count = self.function(last_of_block, self.steps, budget)
        try:
            whole = int(count)
        except (TypeError, ValueError, OverflowError):  # None, "many", NaN, infinity
            whole = -1
        if whole != count or not 0 <= whole <= budget:
            raise MethodError(
                f"the schedule gave b({last_of_block}) = {count!r:.80} for T = {self.steps}, B = {budget}; "
                "it must be a whole number from 0 to B."
            )
        return whole

    def check(self, budget: int) -> None:
        """Walks through the schedule once and refuses one that decreases.

        Raises:
            MethodError: b(t) < b(t - 1) for some t, a value out of range, or too many steps to walk.
        """
        if self.function in _NEVER_DOWN:
            return
        if self.steps // self.stride > MOST_WALKED:
            raise MethodError(
                f"steps = {self.steps:,} with stride = {self.stride:,}; this schedule is checked step by step before training, "
                f"for {MOST_WALKED:,} selecting steps at most. Take a larger stride, or 'uniform' or 'front-loaded'."
            )
        previous = 0
        for t in range(self.stride - 1, self.steps, self.stride):
            count = self.cumulative(t, budget)
            if count < previous:
                raise MethodError(f"the schedule goes down: b({t}) = {count} after {previous}; b(t) must not decrease.")
            previous = count
