"""Means over seeds with Student's confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from unmask.errors import DataError, need


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
    """t with ``P(|T| <= t) = confidence`` for Student's T with so many degrees of freedom.

    Example:
        >>> round(t_quantile(0.95, 2), 4), round(t_quantile(0.95, 30), 4)
        (4.3027, 2.0423)
    """
    return float(need("scipy.stats", "plot").t.ppf((1 + confidence) / 2, degrees))
