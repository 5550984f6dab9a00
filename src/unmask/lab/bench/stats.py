"""From step times to figures: medians, spreads, amortised steps, ratios within a round. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Any

REFERENCE = "frozen"


@dataclass(frozen=True)
class StepTime:
    """One timed step, in seconds.

    Attributes:
        group: Which group of rows ran together.
        round: Of that group; steps of different rows compare within a round.
        forward: Forward pass with the loss.
        backward: Backward pass.
        optimizer: ``step`` and ``zero_grad``.
        selecting: Whether the step unmasked anything.
    """

    group: int
    round: int
    forward: float
    backward: float
    optimizer: float
    selecting: bool = False

    @property
    def total(self) -> float:
        """The whole step."""
        return self.forward + self.backward + self.optimizer

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "total": self.total}


PHASES = ("forward", "backward", "optimizer", "total")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, quartiles and range.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])["q3"]
        4.0
    """
    ordered = sorted(values)
    q1, middle, q3 = quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {"median": middle, "q1": q1, "q3": q3, "min": ordered[0], "max": ordered[-1]}


def timing(steps: Sequence[StepTime], stride: int, tokens: int) -> dict[str, Any]:
    """One row's figures over all its timed steps.

    Args:
        steps: Timed steps, in whole cycles if the row has a stride.
        stride: The row's stride; above 1 the figures tell selecting steps from those in between.
        tokens: Per step.
    """
    figures: dict[str, Any] = {phase: spread(getattr(s, phase) for s in steps) for phase in PHASES}
    figures["steps"] = len(steps)
    figures["tokens_per_second"] = tokens / figures["total"]["median"]
    if stride > 1:
        figures |= strided(steps, stride)
    return figures


def strided(steps: Sequence[StepTime], stride: int) -> dict[str, float]:
    """A strided row's selecting and other steps, and the step that a whole run pays on average.

    ``amortised = (selecting + (stride - 1) between) / stride`` of the two means: over whole cycles just the mean step, and
    what a stride of 100 costs where a timed cycle is shorter.
    """
    selecting = [s.total for s in steps if s.selecting]
    between = [s.total for s in steps if not s.selecting]
    if not selecting or not between:
        return {}
    return {
        "selecting": median(selecting),
        "between": median(between),
        "amortised": (fmean(selecting) + (stride - 1) * fmean(between)) / stride,
    }


def ratio(above: Sequence[StepTime], below: Sequence[StepTime], via: Sequence[StepTime] = ()) -> dict[str, Any] | None:
    """How the step of one row compares with that of another.

    Args:
        above: Timed steps of the numerator.
        below: Of the denominator.
        via: Of a row that ran in every group, to compare rows of different groups through.

    Returns:
        ``ratio`` of the medians over all timed steps of the groups that both ran in, and the spread of the ``rounds``'
        own ratios of medians; None if they cannot be compared.

    Example:
        >>> slow, fast = [StepTime(0, 0, 1.0, 2.0, 0.0)], [StepTime(0, 0, 0.5, 1.0, 0.0)]
        >>> ratio(slow, fast)["ratio"]
        2.0
    """
    common = {s.group for s in above} & {s.group for s in below}
    if common:
        return {
            "ratio": _median(above, common) / _median(below, common),
            "rounds": _by_round(above, below),
            "through": None,
        }
    first, second = (ratio(above, via), ratio(via, below)) if via else (None, None)
    if first is None or second is None:
        return None
    return {"ratio": first["ratio"] * second["ratio"], "rounds": None, "through": REFERENCE}


def _median(steps: Sequence[StepTime], groups: set[int]) -> float:
    return median(s.total for s in steps if s.group in groups)


def _by_round(above: Sequence[StepTime], below: Sequence[StepTime]) -> dict[str, Any] | None:
    first, second = round_medians(above), round_medians(below)
    ratios = [first[key] / second[key] for key in sorted(first.keys() & second.keys())]
    return {**spread(ratios), "each": ratios} if ratios else None


def round_medians(steps: Sequence[StepTime]) -> dict[tuple[int, int], float]:
    """The median step of every (group, round)."""
    keys = {(s.group, s.round) for s in steps}
    return {key: median(s.total for s in steps if (s.group, s.round) == key) for key in keys}
