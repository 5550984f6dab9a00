"""The kind of task whose words each have a tag: named entity recognition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from unmask.errors import ConfigError, DataError
from unmask.lab.models import longest_input
from unmask.lab.tasks.protocol import Kind, Request, Scored, Source, Stage
from unmask.lab.tasks.split import evaluate_splits, metric_key, named
from unmask.lab.tasks.tags.ner import CUSTOM_NER, load_ner, load_tagged, load_tagged_evaluation
from unmask.lab.tasks.tags.spans import METRICS, score
from unmask.lab.tasks.tags.spec import Sentences, TagData, TagSpec
from unmask.lab.tasks.tags.windows import Windows


@dataclass(frozen=True)
class TokenPrepared:
    """A `Prepared` of tagged words. Along the run only the first evaluation split is scored; before and after it, all are.

    Predictions are class ids of windows (see `unmask.lab.tasks.tags.windows`). They are put together to sentences before they
    are scored.
    """

    spec: TagSpec
    max_length: int
    train_set: Windows
    eval_sets: Mapping[str, Windows]
    collate: Callable[[Any], Any]
    notes: tuple[str, ...]

    greater_is_better = True

    @property
    def step_sets(self) -> dict[str, Windows]:
        split = next(iter(self.eval_sets))
        return {split: self.eval_sets[split]}

    def step_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return _scores(next(iter(self.eval_sets.values())), prediction.predictions)

    def reduce_logits(self, logits: Any, labels: Any) -> Tensor:
        """Reduces logits (n, length, classes) to class ids (n, length), int64."""
        return _best(logits[0] if isinstance(logits, tuple) else logits)

    @property
    def step_metric(self) -> str:
        return self.main_metric

    @property
    def main_metric(self) -> str:
        return metric_key(self.eval_sets, self.spec.main_metric)

    def evaluate(self, trainer: Trainer, stage: Stage) -> dict[str, float]:
        def metrics(split: str, ids: Any, _: Any) -> Mapping[str, float]:
            return _scores(self.eval_sets[split], ids)

        return evaluate_splits(trainer, self.eval_sets, metrics, METRICS, stage)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "token",
            "name": self.spec.name,
            "num_labels": len(self.spec.label_names),
            "label_names": list(self.spec.label_names),
            "types": list(self.spec.types),
            "max_length": self.max_length,
        }


@dataclass(frozen=True)
class TokenTask:
    """A `Task` of tagged words."""

    data: TagData

    @property
    def name(self) -> str:
        return self.data.spec.name

    @property
    def num_labels(self) -> int:
        return len(self.data.spec.label_names)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.data.spec.label_names

    @property
    def notes(self) -> tuple[str, ...]:
        return self.data.notes

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source) -> TokenPrepared:
        length = longest_input(model, tokenizer, source.max_length)

        def windows(sentences: Sentences, training: bool) -> Windows:
            return Windows(sentences, tokenizer, self.label_names, length, training)

        train = windows(self.data.train, True)
        evals = {split: windows(sentences.by_length(), False) for split, sentences in self.data.evals.items()}
        notes = [encoded.note(split) for split, encoded in (("train", train), *evals.items())]
        collate = DataCollatorForTokenClassification(tokenizer)
        kept = tuple(note for note in notes if note is not None)
        return TokenPrepared(self.data.spec, length, train, named(evals), collate, kept)

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], batch_size: int
    ) -> Iterator[Scored]:
        for split, sentences in self.data.evals.items():
            windows = Windows(sentences, tokenizer, self.label_names, int(described["max_length"]), training=False)
            ids = predict_tags(model, tokenizer, windows, batch_size)
            yield Scored(split, len(sentences), _scores(windows, ids))


@torch.inference_mode()
def predict_tags(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Windows, batch_size: int = 64
) -> list[list[int]]:
    """Predicts a class id for each token of each window. The model should be in evaluation mode."""
    collate = DataCollatorForTokenClassification(tokenizer)
    # Windows of similar lengths share a batch, because that needs little padding.
    order = sorted(range(len(windows)), key=lambda i: len(windows[i]["input_ids"]))
    result: list[list[int]] = [[] for _ in order]
    for low in range(0, len(order), batch_size):
        rows = order[low : low + batch_size]
        inputs = {
            key: value.to(model.device) for key, value in collate([windows[i] for i in rows]).items() if key != "labels"
        }
        for row, ids in zip(rows, _best(model(**inputs).logits).tolist(), strict=True):
            result[row] = ids
    return result


def _best(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise DataError("a prediction is NaN or infinite: the model has diverged. Lower the learning rate.")
    return logits.argmax(dim=-1)


def _scores(windows: Windows, ids: Any) -> dict[str, float]:
    rows = ids if isinstance(ids, list) else np.asarray(ids)
    return score(windows.sentences.tags, windows.tags_of(rows))


def load(source: Source) -> TokenTask:
    """Loads a known task, or the user's own files."""
    if source.data is None:
        return TokenTask(load_ner(str(source.task), source.data_dir))
    return TokenTask(load_tagged(source.data, source.eval, *_columns(source.text, source.label)))


def reload(described: Mapping[str, Any], request: Request) -> TokenTask:
    """Loads the evaluation splits of a task, or a file of sentences of the task that the delta was trained on.

    Raises:
        ConfigError: The task has other entity types.
        DataError: The data cannot be loaded.
    """
    trained = TagSpec(described["name"], tuple(described["types"]))
    if request.data is not None:
        columns = _columns(request.text, request.label)
        return TokenTask(load_tagged_evaluation(trained, request.data, *columns))
    name = request.task or trained.name
    data = load_ner(name, request.data_dir, need_train=False, spec=trained if name == CUSTOM_NER else None)
    if data.spec.types != trained.types:
        raise ConfigError(
            f"task {name!r} has the entity types {', '.join(data.spec.types)}; the delta was trained with "
            f"{', '.join(trained.types)}."
        )
    return TokenTask(data)


def _columns(text: str, label: str) -> tuple[str | None, str | None]:
    """Returns a table's columns of words and tags. The settings' defaults are the columns of texts, so they mean None here."""
    return None if text == "text" else text, None if label == "label" else label


TOKEN = Kind("token", load, reload)
