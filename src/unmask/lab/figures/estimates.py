"""Estimates from the scores of several runs: the mean of the best runs, or the mean with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from unmask.errors import ConfigError, DataError, need


@dataclass(frozen=True)
class Estimate:
    """The estimate of a method's score.

    Attributes:
        mean: The mean of the runs that count.
        deviation: The sample standard deviation (n - 1) of these runs; None for one run.
        low: The lower end of the confidence interval of the mean; None if there is no interval.
        high: The upper end.
        n: The number of runs that count.
        of: The number of runs that were given.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    n: int
    of: int


def best_of(scores: Sequence[float], best: int = 3) -> Estimate:
    """Returns the mean and deviation of the best runs, as the paper does with three of four.

    The paper does not say whether its deviation is over n or n - 1; here it is over n - 1. The mean of the best runs is
    optimistic, and the more so, the more a method's runs scatter: `interval` is not.

    Args:
        scores: The score of each run; higher is better.
        best: How many runs count.

    Raises:
        DataError: There are no scores, or one is not finite.
        ConfigError: ``best`` is below 1.

    Example:
        >>> best_of([0.80, 0.86, 0.84, 0.85]).mean
        0.85
    """
    _check(scores)
    if best < 1:
        raise ConfigError(f"best = {best}; at least one run must count.")
    kept = sorted(scores, reverse=True)[:best]
    deviation = stdev(kept) if len(kept) > 1 else None
    return Estimate(fmean(kept), deviation, None, None, len(kept), len(scores))


def interval(scores: Sequence[float], level: float = 0.95, how: Literal["t", "bootstrap"] = "t") -> Estimate:
    """Returns the mean over all seeds with a confidence interval of that mean.

    Args:
        scores: The score of each seed. One score alone has no interval.
        level: The level of the interval.
        how: ``"t"``: Student's t, for scores that are about normal. ``"bootstrap"``: percentiles of the means of 10,000
            resamples with a fixed seed; for few seeds it is too narrow. Both need SciPy (extra ``plot``).

    Raises:
        DataError: There are no scores, or one is not finite.
        ConfigError: ``level`` lies outside (0, 1).

    Example:
        >>> estimate = interval([0.80, 0.82, 0.84])
        >>> round(estimate.low, 4), round(estimate.mean, 4), round(estimate.high, 4)
        (0.7703, 0.82, 0.8697)
    """
    _check(scores)
    if not 0 < level < 1:
        raise ConfigError(f"level = {level}; it must lie between 0 and 1, as 0.95 does.")
    mean, n = fmean(scores), len(scores)
    if n == 1:
        return Estimate(mean, None, None, None, n, n)
    deviation = stdev(scores)
    low = high = mean
    if deviation > 0:  # SciPy gives NaN for scores that are all equal.
        stats = need("scipy.stats", "plot")
        if how == "bootstrap":
            settings = {"confidence_level": level, "n_resamples": 10_000, "method": "percentile", "random_state": 0}
            found = stats.bootstrap((scores,), need("numpy", "plot").mean, **settings).confidence_interval
        else:
            found = stats.t.interval(level, n - 1, loc=mean, scale=deviation / math.sqrt(n))
        low, high = map(float, found)
    return Estimate(mean, deviation, low, high, n, n)


def _check(scores: Sequence[float]) -> None:
    if not scores:
        raise DataError("there are no scores to average; give at least one.")
    if not all(math.isfinite(score) for score in scores):
        raise DataError(f"scores = {list(scores)}; every score must be finite.")
