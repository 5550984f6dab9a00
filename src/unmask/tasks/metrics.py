"""Scores of predictions, by scikit-learn and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np

from unmask.errors import DataError, need
from unmask.tasks.data import TaskSpec


def compute(spec: TaskSpec, predictions: Any, labels: Any) -> dict[str, float]:
    """The task's metrics.

    Args:
        spec: The task.
        predictions: (n, classes) scores, or (n,) or (n, 1) real numbers for regression.
        labels: (n,) class ids or real numbers.

    Returns:
        By metric name. F1 is that of class 1. A correlation with a constant is undefined; it counts as 0.

    Raises:
        DataError: A prediction is not finite.

    Example:
        >>> spec = TaskSpec("t", ("text",), 2, None, ("accuracy",), "accuracy")
        >>> compute(spec, np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([0, 0]))
        {'accuracy': 0.5}
    """
    scores, gold = np.asarray(predictions, dtype=np.float64), np.asarray(labels)
    if not np.isfinite(scores).all():
        raise DataError("a prediction is NaN or infinite: the model has diverged. Lower the learning rate.")
    guess = scores.reshape(-1) if spec.regression else scores.argmax(axis=-1)
    return {name: _METRICS[name](gold, guess) for name in spec.metrics}


def _sklearn(function: str) -> Any:
    return getattr(need("sklearn.metrics", "eval"), function)


def _accuracy(gold: np.ndarray, guess: np.ndarray) -> float:
    return float((gold == guess).mean())


def _f1(gold: np.ndarray, guess: np.ndarray) -> float:
    return float(_sklearn("f1_score")(gold, guess, zero_division=0.0))


def _matthews(gold: np.ndarray, guess: np.ndarray) -> float:
    return float(_sklearn("matthews_corrcoef")(gold, guess))


def _correlation(kind: str, gold: np.ndarray, guess: np.ndarray) -> float:
    if gold.size < 2 or np.ptp(gold) == 0 or np.ptp(guess) == 0:
        return 0.0
    return float(getattr(need("scipy.stats", "eval"), kind)(gold, guess).statistic)


def _pearson(gold: np.ndarray, guess: np.ndarray) -> float:
    return _correlation("pearsonr", gold, guess)


def _spearman(gold: np.ndarray, guess: np.ndarray) -> float:
    return _correlation("spearmanr", gold, guess)


def _pearson_spearman(gold: np.ndarray, guess: np.ndarray) -> float:
    return (_pearson(gold, guess) + _spearman(gold, guess)) / 2


def _mse(gold: np.ndarray, guess: np.ndarray) -> float:
    return float(np.square(gold - guess).mean())


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "pearson_spearman": _pearson_spearman,
    "mse": _mse,
}
