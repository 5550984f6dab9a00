"""The contract between a kind of task and a run of ``unmask train`` or ``unmask eval``.

`Kind.load` gives a `Task` (the data), ``load_base`` the model for it, and `Task.prepare` a `Prepared` (what the Trainer takes).
A delta's metadata hold the result of `Prepared.describe`, from which `Kind.reload` gives the task again, so that the delta can
be evaluated on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # a configuration makes a Source, and the command line a Request, before torch is loaded
    from torch.utils.data import Dataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from unmask.lab.models import Head

Stage = Literal["before", "after"]


@dataclass(frozen=True)
class Source:
    """The examples that a run is to load, and how it makes inputs of them.

    The attributes have the names, the meaning and the defaults of the settings of ``unmask train`` (docs/cli.md lists them).
    """

    task: str | None = None
    data_dir: str | None = None
    data: str | None = None
    eval: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    num_labels: int | None = None
    delimiter: str | None = None
    encoding: str = "utf-8"
    drop_missing: bool = False
    seed: int = 0
    held_out: int = 120
    max_length: int = 128
    model: str = ""
    output: str = ""
    prompt: str = "alpaca"
    train_on_prompt: bool = False
    test_sets: tuple[str, ...] = ()
    test_limit: int | None = None
    test_batch_size: int = 16
    max_new_tokens: int = 256

    @classmethod
    def of(cls, settings: object) -> Source:
        """Takes the attributes of the same names from the settings of a run (a ``TrainConfig``)."""
        return cls(**{each.name: getattr(settings, each.name) for each in fields(cls)})


@dataclass(frozen=True)
class Request:
    """The data that ``unmask eval`` is to evaluate a delta on.

    The attributes have the names and the meaning of the command's arguments (``unmask eval --help`` lists them). None stands
    for what the delta was trained on. ``options`` are those of ``--set``.
    """

    task: str | None = None
    data_dir: str | None = None
    data: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    drop_missing: bool = False
    model: str = ""
    delta: str | None = None
    limit: int | None = None
    output: str | None = None
    overwrite: bool = False
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """The metrics of one evaluation split, which has ``count`` examples."""

    split: str
    count: int
    metrics: Mapping[str, float]


class Prepared(Protocol):
    """A task made ready for one model and tokenizer."""

    @property
    def notes(self) -> Sequence[str]:
        """The facts that the user should know about the encoding: inputs that are cut, sentences that are split."""

    @property
    def train_set(self) -> Dataset:
        """The data set that the Trainer trains on."""

    @property
    def step_sets(self) -> Mapping[str, Dataset]:
        """The data sets to evaluate every ``eval_steps``, by the names that precede their metrics (see `split.named`)."""

    @property
    def collate(self) -> Callable[[Any], Any]:
        """A function that makes a batch of examples of these sets."""

    @property
    def step_metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """A function that scores each of `step_sets` (it is not told which); None for the loss alone."""

    @property
    def reduce_logits(self) -> Callable[[Any, Any], Any] | None:
        """The Trainer's ``preprocess_logits_for_metrics``, which keeps less than all logits."""

    @property
    def step_metric(self) -> str:
        """The metric to show along the run: a key of the Trainer's evaluation without its ``eval_``."""

    @property
    def main_metric(self) -> str:
        """The metric that runs are compared by: a key of what `evaluate` returns."""

    @property
    def greater_is_better(self) -> bool:
        """True if a greater main metric is a better one."""

    def evaluate(self, trainer: Trainer, stage: Stage) -> dict[str, float]:
        """Computes the task's metrics before or after training, without a random number that training would draw.

        This may cost far more than an evaluation along the run.
        """

    def describe(self) -> dict[str, Any]:
        """Describes the task, and its ``"kind"``, for `Kind.reload` and ``load_tuned``, as JSON values."""


class Task(Protocol):
    """A loaded task, before there is a model."""

    @property
    def name(self) -> str:
        """The task's name, such as ``"sst2"``."""

    @property
    def num_labels(self) -> int | None:
        """The number of outputs of the head that the base gets; None for no new head."""

    @property
    def label_names(self) -> Sequence[str] | None:
        """The label names to write into the model's config; None to keep the config's own."""

    @property
    def notes(self) -> Sequence[str]:
        """The facts that the user should know about the loading."""

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source) -> Prepared:
        """Encodes the data. The model is only asked for its limits: a run may still wrap it."""

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], batch_size: int
    ) -> Iterable[Scored]:
        """Scores a tuned model, in evaluation mode, on every evaluation split, one after the other (``unmask eval``).

        ``described`` is the task as the delta's metadata describe it.
        """


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    Attributes:
        head: The key of the Auto class in ``unmask.lab.models.HEADS`` that loads the base. It is also the kind's name in a
            delta's metadata.
        load: A function that loads the data of a run.
        reload: A function that loads the evaluation data for a delta, from the delta's metadata and the request. It raises
            ConfigError if the request does not fit the delta.
        eval_batches: The size of a batch that is evaluated along the run, in batches that are trained on.
    """

    head: Head
    load: Callable[[Source], Task]
    reload: Callable[[Mapping[str, Any], Request], Task]
    eval_batches: int = 4
