"""Evaluating every split of a task with the Trainer's own prediction loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch.utils.data import Dataset
from transformers import Trainer

from unmask.lab.tasks.protocol import Stage

T = TypeVar("T")


def named(splits: Mapping[str, T]) -> Mapping[str, T]:
    """Splits by the names that go before their metrics: none where there is only one split.

    Example:
        >>> named({"dev": 1}), named({"dev": 1, "test": 2})
        ({'': 1}, {'dev': 1, 'test': 2})
    """
    return {"": next(iter(splits.values()))} if len(splits) == 1 else splits


def metric_key(splits: Mapping[str, object], metric: str) -> str:
    """A metric's name on the first of some `named` splits.

    Example:
        >>> metric_key({"": 1}, "f1"), metric_key({"dev": 1, "test": 2}, "f1")
        ('f1', 'dev_f1')
    """
    return _prefix(next(iter(splits))) + metric


def _prefix(split: str) -> str:
    return f"{split}_" if split else ""


def evaluate_splits(
    trainer: Trainer,
    splits: Mapping[str, Dataset],
    metrics: Callable[[str, Any, Any], Mapping[str, float]],
    names: Sequence[str],
    stage: Stage,
) -> dict[str, float]:
    """Metrics and loss of every split.

    Args:
        trainer: Whose model is evaluated.
        splits: Data sets, `named`.
        metrics: From a split's name, its predictions and its labels to metrics.
        names: Of those metrics.
        stage: After training, what the Trainer found at its last step is not computed again.

    Returns:
        By name, the split's before it.
    """
    result: dict[str, float] = {}
    along, trainer.compute_metrics = (
        trainer.compute_metrics,
        None,
    )  # what it scores along the run may know one split only
    try:
        for name, examples in splits.items():
            found = _logged(trainer, _prefix(name), (*names, "loss")) if stage == "after" else None
            if found is not None:
                result |= found
                continue
            prediction = trainer.predict(examples, metric_key_prefix="x")
            scores = metrics(name, prediction.predictions, prediction.label_ids)
            result |= {_prefix(name) + key: value for key, value in scores.items()}
            result[f"{_prefix(name)}loss"] = float((prediction.metrics or {})["x_loss"])
    finally:
        trainer.compute_metrics = along
    return result


def _logged(trainer: Trainer, prefix: str, names: Sequence[str]) -> dict[str, float] | None:
    """A split's evaluation at the last step of training, from the Trainer's log; None if there was none."""
    state = trainer.state
    logged = {key: row[key] for row in state.log_history if row.get("step") == state.global_step for key in row}
    found = {prefix + name: logged.get(f"eval_{prefix}{name}") for name in names}
    return None if None in found.values() else found  # type: ignore[return-value]
