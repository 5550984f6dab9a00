"""Evaluating every split of a task with the Trainer's own prediction loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer


def metric_key(splits: Sized, metric: str) -> str:
    """A metric's name on the first split: with the split before it, where there is more than one.

    Example:
        >>> metric_key({"dev": None}, "f1"), metric_key({"dev": None, "test": None}, "f1")
        ('f1', 'dev_f1')
    """
    return f"{next(iter(splits))}_{metric}" if len(splits) > 1 else metric  # type: ignore[call-overload]


def evaluate_splits(
    trainer: Trainer, splits: Mapping[str, Dataset], metrics: Callable[[str, Any, Any], Mapping[str, float]]
) -> dict[str, float]:
    """Metrics and loss of every split.

    Args:
        trainer: Whose model is evaluated.
        splits: Data sets by name.
        metrics: From a split's name, its predictions and its labels to metrics.

    Returns:
        By name, the split's before it where there is more than one split.
    """
    result: dict[str, float] = {}
    along, trainer.compute_metrics = (
        trainer.compute_metrics,
        None,
    )  # what it scores along the run may know one split only
    try:
        for name, examples in splits.items():
            prefix = f"{name}_" if len(splits) > 1 else ""
            prediction = trainer.predict(examples, metric_key_prefix="x")
            scores = metrics(name, prediction.predictions, prediction.label_ids)
            result |= {prefix + key: value for key, value in scores.items()}
            result[f"{prefix}loss"] = float((prediction.metrics or {})["x_loss"])
    finally:
        trainer.compute_metrics = along
    return result
