"""The splits of a task: holds examples out of the training data, compares splits, and evaluates each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from unmask.errors import DataError

if TYPE_CHECKING:  # data are loaded without torch
    from torch.utils.data import Dataset
    from transformers import EvalPrediction, Trainer

    from unmask.lab.tasks.protocol import Stage


class Rows(Protocol):
    """Examples that can be split."""

    def __len__(self) -> int:
        """The number of examples."""

    @property
    def keys(self) -> Sequence[str]:
        """The key of each example (see `text_key`). Examples of equal keys stay on one side of a split."""

    def take(self, rows: Sequence[int]) -> Self:
        """Returns the examples of the given rows, in that order."""


_Rows = TypeVar("_Rows", bound=Rows)
_Spec = TypeVar("_Spec")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Loaded(Generic[_Spec, _Rows]):
    """A loaded task.

    Attributes:
        spec: The task.
        train: The training split, which may be empty if only evaluation was asked for.
        evals: The evaluation splits by name, the main one first.
        notes: The facts that the user should know about the loading: rows left out or held out, and sizes that are not the
            official ones.
    """

    spec: _Spec
    train: _Rows
    evals: Mapping[str, _Rows]
    notes: tuple[str, ...] = ()


def hold_out_a_tenth(examples: _Rows, noun: str, seed: int) -> tuple[_Rows, _Rows, str]:
    """Splits training data for a user who gives no evaluation data; returns both sides and a note that says so.

    No text (up to case and blanks) is on both sides, and both keep the given order.

    Raises:
        DataError: One side would be empty.

    Example:
        >>> from unmask.lab.tasks import Examples
        >>> train, held, note = hold_out_a_tenth(Examples(["a", "b", "A ", "c"], None, [0, 1, 0, 1]), "texts", seed=0)
        >>> len(train), len(held), note
        (3, 1, 'no evaluation data given: 1 of 4 texts are held out (seed 0)')
    """
    held = held_rows(examples.keys, max(1, round(0.1 * len(examples))), seed)
    note = f"no evaluation data given: {len(held):,} of {len(examples):,} {noun} are held out (seed {seed})"
    return examples.take([row for row in range(len(examples)) if row not in held]), examples.take(sorted(held)), note


def held_rows(keys: Sequence[str], count: int, seed: int) -> set[int]:
    """Chooses up to ``count`` rows to hold out, by the rows' keys. Rows of equal keys stay together.

    The choice goes by the SHA-256 of seed and key, so it depends neither on the order of the rows nor on the version of
    a random generator.

    Raises:
        DataError: One side would be empty.

    Example:
        >>> held_rows(["a", "b", "a", "c"], 1, seed=0)
        {1}
    """
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    held: set[int] = set()
    for key in sorted(groups, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest()):
        if len(held) + len(groups[key]) <= count:
            held.update(groups[key])
    if not held or len(held) == len(keys):
        raise DataError(
            f"{len(keys)} examples with {len(groups)} distinct texts cannot be split into training and evaluation "
            "data; give an evaluation file."
        )
    return held


def shared(train: Sequence[str], evaluation: Sequence[str]) -> int:
    """Counts the evaluation keys that are also in the training data.

    Example:
        >>> shared(["a", "b"], ["b", "b", "c"])
        2
    """
    known = set(train)
    return sum(key in known for key in evaluation)


def text_key(*texts: str) -> str:
    """Returns a key that texts share if they are equal up to case and blanks.

    Example:
        >>> text_key("  A b\\n")
        'a b'
    """
    return "\n".join(" ".join(text.lower().split()) for text in texts)


def unofficial(name: str, noun: str, splits: Mapping[str, Sized], official: Mapping[str, int]) -> tuple[str, ...]:
    """Makes a note if a split that has examples has another size than the official one: a sample, or another version.

    Example:
        >>> unofficial("rte", "examples", {"dev": range(100)}, {"dev": 277})
        ('not the official rte data: dev has 100 examples (official: 277); do not report the score as the official one',)
    """
    other = [
        f"{split} has {len(rows):,} {noun} (official: {format(official[split], ',') if split in official else 'none'})"
        for split, rows in splits.items()
        if len(rows) not in (0, official.get(split))
    ]
    if not official or not other:
        return ()
    return (f"not the official {name} data: {'; '.join(other)}; do not report the score as the official one",)


def named(splits: Mapping[str, _T]) -> Mapping[str, _T]:
    """Returns the splits by the names that precede their metrics: the empty name if there is only one split.

    Example:
        >>> named({"dev": 1}), named({"dev": 1, "test": 2})
        ({'': 1}, {'dev': 1, 'test': 2})
    """
    return {"": next(iter(splits.values()))} if len(splits) == 1 else splits


def evaluate_splits(
    trainer: Trainer,
    splits: Mapping[str, Dataset],
    metrics: Callable[[str, Any, Any], Mapping[str, float]],
    names: Sequence[str],
    stage: Stage,
) -> dict[str, float]:
    """Computes the metrics and the loss of every split (`named`) with the Trainer's own prediction loop.

    ``metrics`` maps a split's name, its predictions and its labels to metrics of these ``names``. After training, what the
    Trainer found at its last step is not computed again.
    """
    result: dict[str, float] = {}
    state = trainer.state
    logged = {key: row[key] for row in state.log_history if row.get("step") == state.global_step for key in row}
    # The Trainer's own function, for evaluations along the run, may know one split only.
    along, trainer.compute_metrics = trainer.compute_metrics, None
    try:
        for name, examples in splits.items():
            prefix = f"{name}_" if name else ""
            keys = [prefix + metric for metric in (*names, "loss")]
            if stage == "after" and all(logged.get(f"eval_{key}") is not None for key in keys):
                result |= {key: logged[f"eval_{key}"] for key in keys}
                continue
            prediction = trainer.predict(examples, metric_key_prefix="x")
            scores = metrics(name, prediction.predictions, prediction.label_ids)
            result |= {prefix + key: value for key, value in scores.items()}
            result[f"{prefix}loss"] = float((prediction.metrics or {})["x_loss"])
    finally:
        trainer.compute_metrics = along
    return result


@dataclass(frozen=True)
class PreparedSplits:
    """The `Prepared` of a task that has one data set per evaluation split, and the same metrics on each.

    `unmask.lab.tasks.protocol.Prepared` explains the attributes that are left out here.

    Attributes:
        described: The result of `describe`.
        eval_sets: The data sets of all evaluation splits, `named`, the main one first.
        score: A function from a split's name, its predictions and its labels to metrics.
        metrics: The names of those metrics.
        metric: The one of them that runs are compared by.
    """

    described: dict[str, Any]
    notes: Sequence[str]
    train_set: Dataset
    eval_sets: Mapping[str, Dataset]
    step_sets: Mapping[str, Dataset]
    collate: Callable[[Any], Any]
    score: Callable[[str, Any, Any], dict[str, float]]
    metrics: Sequence[str]
    metric: str
    greater_is_better: bool = True
    reduce_logits: Callable[[Any, Any], Any] | None = None

    @property
    def main_metric(self) -> str:
        split = next(iter(self.eval_sets))
        return f"{split}_{self.metric}" if split else self.metric

    @property
    def step_metric(self) -> str:
        return self.main_metric

    def step_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.score(next(iter(self.step_sets)), prediction.predictions, prediction.label_ids)

    def evaluate(self, trainer: Trainer, stage: Stage) -> dict[str, float]:
        return evaluate_splits(trainer, self.eval_sets, self.score, self.metrics, stage)

    def describe(self) -> dict[str, Any]:
        return self.described
