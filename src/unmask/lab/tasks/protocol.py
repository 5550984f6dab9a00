"""What a kind of task owes a run of ``unmask train`` and ``unmask eval``.

`Kind.load` gives a `Task` (the data), `load_base` the model for it, `Task.prepare` a `Prepared` (what the Trainer takes). A
delta's metadata carries `Prepared.describe`, from which `Kind.reload` gives the task again, to evaluate the delta on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from unmask.lab.models import Head
from unmask.lab.training.config import TrainConfig

Stage = Literal["before", "after"]


@dataclass(frozen=True)
class Request:
    """What ``unmask eval`` is to evaluate a delta on.

    Attributes:
        task: A task's name; None for the one that the delta was trained on.
        data_dir: Folder of the tasks' files; None for the hub.
        data: An evaluation file instead of a task.
        text: Its text column.
        text_pair: Its second text column.
        label: Its label column.
        model: The base model, as given.
        delta: Path of the delta; None for the base alone.
        limit: Only the first so many examples of each set (generation).
        output: Folder of per-item outputs (generation).
        overwrite: Delete the outputs that are there.
        options: Further settings of the kind.
    """

    task: str | None = None
    data_dir: str | None = None
    data: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    model: str = ""
    delta: str | None = None
    limit: int | None = None
    output: str | None = None
    overwrite: bool = False
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """The metrics of one evaluation split.

    Attributes:
        split: Its name.
        count: How many examples it has.
        metrics: By name.
    """

    split: str
    count: int
    metrics: Mapping[str, float]


class Prepared(Protocol):
    """A task made ready for one model and tokenizer."""

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of the encoding: inputs cut, sentences split."""

    @property
    def train_set(self) -> Dataset:
        """What the Trainer trains on."""

    @property
    def step_sets(self) -> Mapping[str, Dataset]:
        """What is evaluated along the run, every ``eval_steps``; empty for nothing.

        By the names that go before their metrics; a single set may be called "" for none (see `splits.named`).
        """

    @property
    def collate(self) -> Callable[[Any], Any]:
        """Makes a batch of examples of these sets."""

    @property
    def step_metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """Scores each of `step_sets` (without being told which); None: the loss alone, and no predictions are kept."""

    @property
    def reduce_logits(self) -> Callable[[Any, Any], Any] | None:
        """The Trainer's ``preprocess_logits_for_metrics``, to keep less than all logits."""

    @property
    def step_metric(self) -> str:
        """The metric shown along the run: a key of the Trainer's evaluation without its ``eval_``."""

    @property
    def main_metric(self) -> str:
        """What runs are compared by: a key of what `evaluate` returns."""

    @property
    def greater_is_better(self) -> bool:
        """Whether a greater main metric is a better one."""

    def evaluate(self, trainer: Trainer, stage: Stage) -> dict[str, float]:
        """The task's metrics, before or after training; may be far more costly than what runs along the way.

        Draws no random number that training would draw.
        """

    def describe(self) -> dict[str, Any]:
        """For the delta's metadata, as JSON values: what `Kind.reload` and `load_tuned` need. Holds ``"kind"``."""


class Task(Protocol):
    """A loaded task, before there is a model."""

    @property
    def name(self) -> str:
        """E.g. ``"sst2"``."""

    @property
    def num_labels(self) -> int | None:
        """Outputs of the head that the base gets; None: no new head."""

    @property
    def label_names(self) -> Sequence[str] | None:
        """Written into the model's config; None for the config's own."""

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of the loading."""

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> Prepared:
        """Encodes the data. The model is the base as loaded, only to be asked for its limits: a run may still wrap it."""

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], batch_size: int
    ) -> Iterable[Scored]:
        """Scores a tuned model, in evaluation mode, on every evaluation split, one after the other (``unmask eval``).

        Args:
            model: Base + delta.
            tokenizer: Its tokenizer.
            described: The task as the delta's metadata describe it.
            batch_size: Examples per forward.
        """


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    Attributes:
        head: Which of transformers' Auto classes loads the base; also the kind's name in a delta's metadata.
        load: The data of a run.
        reload: The evaluation data for a delta, from its metadata and what was asked for. Refuses (ConfigError) what does
            not fit the delta.
        eval_batches: Size of a batch that is evaluated along the run, in batches that are trained on.
    """

    head: Head
    load: Callable[[TrainConfig], Task]
    reload: Callable[[Mapping[str, Any], Request], Task]
    eval_batches: int = 4
