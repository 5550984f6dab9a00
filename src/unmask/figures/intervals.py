"""Means over seeds with Student's confidence interval. The standard library is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from unmask.errors import DataError


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """Mean, and half the width of its confidence interval by Student's t; None for a single value.

    Raises:
        DataError: No values, or ``confidence`` outside 0..1.

    Example:
        >>> mean, half = mean_interval([0.80, 0.82, 0.84])
        >>> round(mean, 3), round(half, 3)
        (0.82, 0.05)
    """
    if not values:
        raise DataError("there is no value to average; give at least one.")
    if not 0 < confidence < 1:
        raise DataError(f"confidence = {confidence}; it must be between 0 and 1.")
    if len(values) == 1:
        return values[0], None
    return fmean(values), t_quantile(confidence, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def t_quantile(confidence: float, degrees: int) -> float:
    """t with ``P(|T| <= t) = confidence`` for Student's T with a whole number of degrees of freedom, by bisection.

    Example:
        >>> round(t_quantile(0.95, 2), 4), round(t_quantile(0.95, 30), 4)
        (4.3027, 2.0423)
    """
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """``P(|T| <= t)``: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
