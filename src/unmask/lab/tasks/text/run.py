"""Texts, or pairs of texts, with a class or a number each: GLUE, and the user's own tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from unmask.errors import ConfigError
from unmask.lab.models import describe_task, longest_input
from unmask.lab.tasks import GLUE, compute, load_evaluation, load_files, load_glue
from unmask.lab.tasks.protocol import Kind, Request, Scored, Stage
from unmask.lab.tasks.splits import evaluate_splits, metric_key, named
from unmask.lab.tasks.text.data import Examples, TaskData, TaskSpec
from unmask.lab.tasks.text.predicting import predict
from unmask.lab.training.config import TrainConfig


class Encoded(Dataset):
    """Tokenized examples: ``input_ids``, ``attention_mask`` ... and ``labels``, unpadded.

    An example is tokenized when it is asked for, a batch at a time: a short run does not wait for all of a large training set.
    """

    def __init__(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, regression: bool
    ) -> None:
        self._examples, self._tokenizer, self._max_length = examples, tokenizer, max_length
        self._labels = [float(label) if regression else int(label) for label in examples.labels]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """A batch, as PyTorch's loaders ask for it."""
        asked = self._examples.take(rows)
        inputs = self._tokenizer(asked.texts, asked.pairs, truncation=True, max_length=self._max_length)
        return [
            {key: values[place] for key, values in inputs.items()} | {"labels": self._labels[row]}
            for place, row in enumerate(rows)
        ]


@dataclass(frozen=True)
class SequencePrepared:
    """A `Prepared` of texts with one label each; every evaluation split is cheap enough to be scored along the run."""

    spec: TaskSpec
    max_length: int
    train_set: Dataset
    step_sets: Mapping[str, Dataset]
    collate: Callable[[Any], Any]
    notes: tuple[str, ...]
    reduce_logits: None = None

    def step_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return compute(self.spec, prediction.predictions, prediction.label_ids)

    @property
    def step_metric(self) -> str:
        return metric_key(self.step_sets, self.spec.main_metric)

    @property
    def main_metric(self) -> str:
        return self.step_metric

    @property
    def greater_is_better(self) -> bool:
        return self.spec.greater_is_better

    def evaluate(self, trainer: Trainer, stage: Stage) -> dict[str, float]:
        def metrics(_: str, scores: Any, labels: Any) -> Mapping[str, float]:
            return compute(self.spec, scores, labels)

        return evaluate_splits(trainer, self.step_sets, metrics, self.spec.metrics, stage)

    def describe(self) -> dict[str, Any]:
        return describe_task(self.spec, self.max_length)


@dataclass(frozen=True)
class SequenceTask:
    """A `Task` of texts with one label each."""

    data: TaskData
    label_names: None = None

    @property
    def name(self) -> str:
        return self.data.spec.name

    @property
    def num_labels(self) -> int:
        return self.data.spec.num_labels

    @property
    def notes(self) -> tuple[str, ...]:
        return self.data.notes

    def prepare(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
    ) -> SequencePrepared:
        length = longest_input(model, tokenizer, config.max_length)
        cut = f"inputs are cut at the {length} tokens that {config.model} has positions for."

        def encoded(examples: Examples) -> Encoded:
            return Encoded(examples, tokenizer, length, self.data.spec.regression)

        return SequencePrepared(
            self.data.spec,
            length,
            encoded(self.data.train),
            named({split: encoded(examples.by_length()) for split, examples in self.data.evals.items()}),
            DataCollatorWithPadding(tokenizer),
            (cut,) if length < config.max_length else (),
        )

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], batch_size: int
    ) -> Iterator[Scored]:
        for split, examples in self.data.evals.items():
            scores = predict(model, tokenizer, examples, int(described["max_length"]), batch_size)
            yield Scored(split, len(examples), compute(self.data.spec, scores, examples.labels))


def load(config: TrainConfig) -> SequenceTask:
    """A GLUE task, the user's own files, or a hub data set."""
    if config.task is not None:
        return SequenceTask(load_glue(config.task, config.data_dir))
    assert config.data is not None, "checked by TrainConfig"
    return SequenceTask(load_files(config.data, config.eval, config.text, config.label, config.text_pair))


def reload(described: Mapping[str, Any], request: Request) -> SequenceTask:
    """The evaluation splits of a GLUE task, or a file of examples of the task that the delta was trained on.

    Raises:
        ConfigError: A task and a file, or a task with another number of labels.
        DataError: They cannot be loaded.
    """
    data = _glue(described, request) if request.data is None else _file(described, request)
    spec = data.spec
    if spec.num_labels != described["num_labels"]:
        raise ConfigError(
            f"task {spec.name!r} has {spec.num_labels} labels; the delta was trained with {described['num_labels']}."
        )
    return SequenceTask(data)


def _glue(described: Mapping[str, Any], request: Request) -> TaskData:
    return load_glue(request.task or described["name"], request.data_dir, need_train=False)


def _file(described: Mapping[str, Any], request: Request) -> TaskData:
    if request.task is not None:
        raise ConfigError("give either --task or --data, not both.")
    assert request.data is not None, "asked by `reload`"
    names, metrics = described["label_names"], _metrics(described)
    spec = TaskSpec(
        described["name"],
        tuple(described["text_columns"]),
        described["num_labels"],
        tuple(names) if names else None,
        metrics,
        metrics[0],
    )
    examples = load_evaluation(spec, request.data, request.text, request.label, request.text_pair)
    return TaskData(spec, Examples([], None, []), {"eval": examples})


def _metrics(described: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of training, the main one first."""
    name, labels = described["name"], described["num_labels"]
    if name in GLUE and GLUE[name].num_labels == labels:
        return GLUE[name].metrics
    if labels == 1:
        return ("pearson_spearman", "pearson", "spearman", "mse")
    return ("accuracy", "f1") if labels == 2 else ("accuracy",)


SEQUENCE = Kind("sequence", load, reload)
