"""Scores predictions with the metrics of scikit-learn and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np

from unmask.errors import DataError, need
from unmask.lab.tasks.text.spec import TaskSpec

# An array of a smaller relative spread counts as constant, because scipy's correlation is rounding noise there.
_CONSTANT = 1e-12


def compute(spec: TaskSpec, predictions: Any, labels: Any) -> dict[str, float]:
    """Computes the task's metrics, as fractions and not in percent.

    Args:
        spec: The task.
        predictions: (n, classes) scores, or (n,) or (n, 1) real numbers for regression.
        labels: (n,) class ids or real numbers.

    Returns:
        The values by metric name. F1 is that of class 1. An undefined metric is 0: Matthews' and the other correlations
        with a constant, and F1 if class 1 is neither labelled nor predicted.

    Raises:
        DataError: The shapes do not fit, there are no rows, a prediction is not finite, or a label is none of the task's.

    Example:
        >>> spec = TaskSpec("t", ("text",), 2, None, ("accuracy",), "accuracy")
        >>> compute(spec, np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([0, 0]))
        {'accuracy': 0.5}
    """
    scores, gold = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    rows = len(gold) if gold.ndim == 1 else -1
    fitting = [(rows,), (rows, 1)] if spec.regression else [(rows, spec.num_labels)]
    if rows < 1 or scores.shape not in fitting:
        shapes = "(n,) or (n, 1)" if spec.regression else f"(n, {spec.num_labels})"
        raise DataError(
            f"task {spec.name!r}: predictions of shape {scores.shape} and labels of shape {gold.shape} do not fit; they "
            f"must be {shapes} and (n,), with n at least 1."
        )
    if not np.isfinite(scores).all():
        raise DataError("a prediction is NaN or infinite: the model has diverged. Lower the learning rate.")
    wrong = ~np.isfinite(gold) if spec.regression else ~np.isin(gold, range(spec.num_labels))
    if wrong.any():
        row = int(wrong.argmax())
        allowed = "finite numbers" if spec.regression else f"0 to {spec.num_labels - 1}"
        raise DataError(f"task {spec.name!r}: label {gold[row]:g} of row {row} is not allowed; allowed: {allowed}.")
    if spec.regression:
        return {name: _metric(name, gold, scores.reshape(-1)) for name in spec.metrics}
    return {name: _metric(name, gold.astype(np.int64), scores.argmax(axis=-1)) for name in spec.metrics}


def _metric(name: str, gold: np.ndarray, guess: np.ndarray) -> float:
    """Computes one metric of (n,) class ids, or of (n,) real numbers."""
    if name == "mse":
        return float(np.square(gold - guess).mean())
    if name == "pearson_spearman":
        return (_metric("pearson", gold, guess) + _metric("spearman", gold, guess)) / 2
    constant = any(np.ptp(values) <= _CONSTANT * np.abs(values).max() for values in (gold, guess))
    if constant and name not in ("accuracy", "f1"):
        return 0.0
    if name in ("pearson", "spearman"):
        stats = need("scipy.stats", "eval")
        return float((stats.pearsonr if name == "pearson" else stats.spearmanr)(gold, guess).statistic)
    metrics = need("sklearn.metrics", "eval")
    if name == "f1":
        return float(metrics.f1_score(gold, guess, zero_division=0.0))
    return float((metrics.accuracy_score if name == "accuracy" else metrics.matthews_corrcoef)(gold, guess))
