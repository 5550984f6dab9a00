"""From the scores of several seeds to one figure: the paper's way, and with a confidence interval. No torch here."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from unmask.errors import ConfigError
from unmask.lab.figures.intervals import t_quantile
from unmask.lab.study.spec import Protocol


@dataclass(frozen=True)
class Estimate:
    """A figure over several runs.

    Attributes:
        mean: Of the runs that count.
        deviation: Their sample standard deviation (n - 1); None for one run.
        low: Lower end of the confidence interval; None without one.
        high: Upper end.
        n: How many runs count.
        of: How many there were.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    n: int
    of: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def best_of(scores: Sequence[float], best: int = 3) -> Estimate:
    """The paper's protocol: mean and deviation of the best three of four runs.

    Whether the paper's deviation is over n or n - 1 is not known; here it is over n - 1. The best of several runs
    is an optimistic figure, the more so the more a method's runs scatter: see `interval` beside it.

    Args:
        scores: One for each run, higher is better.
        best: How many count.

    Raises:
        ConfigError: No scores, or ``best`` below 1.

    Example:
        >>> best_of([0.80, 0.86, 0.84, 0.85]).mean
        0.85
    """
    _check(scores)
    if best < 1:
        raise ConfigError(f"best = {best}; at least one run must count.")
    kept = sorted(scores, reverse=True)[:best]
    return Estimate(fmean(kept), _deviation(kept), None, None, len(kept), len(scores))


def interval(
    scores: Sequence[float], level: float = 0.95, how: Literal["t", "bootstrap"] = "t", resamples: int = 10_000
) -> Estimate:
    """The mean over all seeds, with a confidence interval of that mean.

    Args:
        scores: One for each seed.
        level: Of the interval.
        how: ``"t"``: Student's t, for scores that are about normal (needs the extra ``plot``); ``"bootstrap"``: percentiles of
            the means of resampled scores, which is too narrow for few seeds.
        resamples: Of the bootstrap, with a fixed seed.

    Raises:
        ConfigError: No scores, or a level outside (0, 1).

    Example:
        >>> estimate = interval([0.80, 0.82, 0.84])
        >>> round(estimate.low, 4), round(estimate.mean, 4), round(estimate.high, 4)
        (0.7703, 0.82, 0.8697)
    """
    _check(scores)
    if not 0 < level < 1:
        raise ConfigError(f"level = {level}; it must lie between 0 and 1, as 0.95 does.")
    mean, deviation, n = fmean(scores), _deviation(scores), len(scores)
    if deviation is None:
        return Estimate(mean, None, None, None, n, n)
    if how == "bootstrap":
        low, high = _percentiles(scores, level, resamples)
    else:
        reach = t_quantile(level, n - 1) * deviation / math.sqrt(n)
        low, high = mean - reach, mean + reach
    return Estimate(mean, deviation, low, high, n, n)


def estimate(scores: Sequence[float], protocol: Protocol) -> Estimate:
    """The figure that a sweep's protocol makes of the scores of a cell."""
    if protocol.kind == "paper":
        return best_of(scores, protocol.best)
    return interval(scores, protocol.level, protocol.interval)


def _check(scores: Sequence[float]) -> None:
    if not scores:
        raise ConfigError("there are no scores to take a mean of.")
    if not all(math.isfinite(score) for score in scores):
        raise ConfigError(f"scores = {list(scores)}; every one must be finite.")


def _deviation(scores: Sequence[float]) -> float | None:
    return stdev(scores) if len(scores) > 1 else None


def _percentiles(scores: Sequence[float], level: float, resamples: int) -> tuple[float, float]:
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(scores, k=len(scores))) for _ in range(resamples))
    tail = (1 - level) / 2
    return means[int(tail * (resamples - 1))], means[math.ceil((1 - tail) * (resamples - 1))]
