"""The kind of task whose words each have a tag: named entity recognition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from unmask.errors import ConfigError, DataError
from unmask.lab.models import longest_input
from unmask.lab.tasks.protocol import Kind, Request, Scored, Source
from unmask.lab.tasks.split import PreparedSplits, named
from unmask.lab.tasks.tags.ner import CUSTOM_NER, load_ner, load_tagged, load_tagged_evaluation
from unmask.lab.tasks.tags.spans import METRICS
from unmask.lab.tasks.tags.spec import TagData, TagSpec
from unmask.lab.tasks.tags.windows import Windows


class TokenTask:
    """A `Task` of tagged words.

    Predictions are class ids of windows (see `unmask.lab.tasks.tags.windows`). They are put together to sentences before they
    are scored.
    """

    def __init__(self, data: TagData) -> None:
        self.data = data
        self.name = data.spec.name
        self.label_names = data.spec.label_names
        self.num_labels = len(self.label_names)
        self.notes = data.notes

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source) -> PreparedSplits:
        spec, length = self.data.spec, longest_input(model, tokenizer, source.max_length)
        train = Windows(self.data.train, tokenizer, self.label_names, length, training=True)
        encoded = {
            split: Windows(sentences.by_length(), tokenizer, self.label_names, length, training=False)
            for split, sentences in self.data.evals.items()
        }
        notes = [windows.note(split) for split, windows in {"train": train, **encoded}.items()]
        evals = named(encoded)
        main = next(iter(evals))
        return PreparedSplits(
            described={
                "kind": "token",
                "name": self.name,
                "num_labels": self.num_labels,
                "label_names": list(self.label_names),
                "types": list(spec.types),
                "max_length": length,
                **({"files": {"text": source.text, "label": source.label}} if spec.name == CUSTOM_NER else {}),
            },
            notes=[note for note in notes if note is not None],
            train_set=train,
            eval_sets=evals,
            step_sets={main: evals[main]},  # the others are scored before and after the run only
            collate=DataCollatorForTokenClassification(tokenizer),
            score=lambda split, ids, _: evals[split].score(ids),
            metrics=METRICS,
            metric=spec.main_metric,
            reduce_logits=_best,
        )

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], batch_size: int
    ) -> Iterator[Scored]:
        collate = DataCollatorForTokenClassification(tokenizer)
        for split, sentences in self.data.evals.items():
            windows = Windows(sentences, tokenizer, self.label_names, int(described["max_length"]), training=False)
            # Windows of similar lengths share a batch, because that needs little padding.
            lengths = [len(windows[row]["input_ids"]) for row in range(len(windows))]
            order = sorted(range(len(windows)), key=lengths.__getitem__)
            found: list[list[int]] = [[] for _ in order]
            for low in range(0, len(order), batch_size):
                rows = order[low : low + batch_size]
                batch = collate([windows[row] for row in rows])
                inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
                with torch.inference_mode():
                    best = _best(model(**inputs).logits)
                for row, ids in zip(rows, best.tolist(), strict=True):
                    found[row] = ids
            yield Scored(split, len(sentences), windows.score(found))


def _best(logits: Any, _: Any = None) -> Tensor:
    """Reduces a model's logits (n, length, classes), which may come first in a tuple, to class ids (n, length), int64."""
    scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
    if not torch.isfinite(scores).all():
        raise DataError("a prediction is NaN or infinite: the model has diverged. Lower the learning rate.")
    return scores.argmax(dim=-1)


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
        files = described.get("files", {})
        columns = _columns(request.text or files.get("text", "text"), request.label or files.get("label", "label"))
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
