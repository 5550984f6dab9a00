"""The kind of task whose texts, or pairs of texts, each have a class or a number: GLUE, and the user's own tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from unmask.errors import ConfigError
from unmask.lab.models import longest_input
from unmask.lab.tasks.protocol import Kind, Request, Scored, Source
from unmask.lab.tasks.split import PreparedSplits, named
from unmask.lab.tasks.tables import TextFormat
from unmask.lab.tasks.text.files import load_evaluation, load_files
from unmask.lab.tasks.text.glue import GLUE, load_glue
from unmask.lab.tasks.text.metrics import compute
from unmask.lab.tasks.text.spec import CUSTOM, Examples, TaskData, TaskSpec, default_metrics


class Encoded(Dataset):
    """Tokenized examples: ``input_ids``, ``attention_mask`` and so on, and ``labels``, unpadded.

    An example is tokenized when it is asked for, a batch at a time, so a short run does not wait for a large training set.
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
        """Returns the examples of a batch, as PyTorch's data loaders ask for them."""
        asked = self._examples.take(rows)
        inputs = self._tokenizer(asked.texts, asked.pairs, truncation=True, max_length=self._max_length)
        return [
            {key: values[place] for key, values in inputs.items()} | {"labels": self._labels[row]}
            for place, row in enumerate(rows)
        ]


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    max_length: int,
    batch_size: int = 64,
) -> np.ndarray:
    """Computes a model's scores for examples, float32 of shape (n, labels). The model should be in evaluation mode."""
    # Examples of similar lengths share a batch, because that needs little padding.
    order = sorted(range(len(examples)), key=lambda i: len(examples.texts[i]))
    scores: list[torch.Tensor] = []
    for low in range(0, len(order), batch_size):
        asked = examples.take(order[low : low + batch_size])
        inputs = tokenizer(
            asked.texts, asked.pairs, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
        )
        scores.append(model(**inputs.to(model.device)).logits.float().cpu())
    return torch.cat(scores)[torch.tensor(order).argsort()].numpy() if scores else np.empty((0, 0), dtype=np.float32)


def describe(spec: TaskSpec, source: Source, max_length: int) -> dict[str, Any]:
    """Describes a task for a delta's metadata, as JSON values. `reload` and `unmask.lab.models.load_tuned` read them."""
    files = {"label": source.label, "delimiter": source.delimiter, "encoding": source.encoding}
    return {
        "kind": "sequence",
        "name": spec.name,
        "text_columns": list(spec.text_columns),
        "num_labels": spec.num_labels,
        "label_names": list(spec.label_names) if spec.label_names else None,
        "max_length": max_length,
        **({"files": files} if spec.name == CUSTOM else {}),
    }


class SequenceTask:
    """A `Task` of texts with one label each."""

    def __init__(self, data: TaskData) -> None:
        self.data = data
        self.name = data.spec.name
        self.num_labels = data.spec.num_labels
        self.notes = data.notes
        self.label_names = data.spec.label_names

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source) -> PreparedSplits:
        spec, length = self.data.spec, longest_input(model, tokenizer, source.max_length)
        cut = f"inputs are cut at the {length} tokens that {source.model} has positions for."
        encode = partial(Encoded, tokenizer=tokenizer, max_length=length, regression=spec.regression)
        evals = named({split: encode(examples.by_length()) for split, examples in self.data.evals.items()})
        return PreparedSplits(
            described=describe(spec, source, length),
            notes=(cut,) if length < source.max_length else (),
            train_set=encode(self.data.train),
            eval_sets=evals,
            step_sets=evals,  # each is cheap enough to be scored along the run
            collate=DataCollatorWithPadding(tokenizer),
            score=lambda _, scores, labels: compute(spec, scores, labels),
            metrics=spec.metrics,
            metric=spec.main_metric,
            greater_is_better=spec.greater_is_better,
        )

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any], batch_size: int
    ) -> Iterator[Scored]:
        for split, examples in self.data.evals.items():
            scores = predict(model, tokenizer, examples, int(described["max_length"]), batch_size)
            yield Scored(split, len(examples), compute(self.data.spec, scores, examples.labels))


def load(source: Source) -> SequenceTask:
    """Loads a GLUE task, the user's own files, or a data set of the hub."""
    if source.task is not None:
        return SequenceTask(load_glue(source.task, source.data_dir))
    assert source.data is not None, "a source without a task has data"
    return SequenceTask(
        load_files(
            source.data,
            source.eval,
            source.text,
            source.label,
            source.text_pair,
            num_labels=source.num_labels,
            form=TextFormat(source.delimiter, source.encoding),
            drop_missing=source.drop_missing,
        )
    )


def reload(described: Mapping[str, Any], request: Request) -> SequenceTask:
    """Loads the evaluation splits of a GLUE task, or a file of examples of the task that the delta was trained on.

    A file is read as the one that was trained on: its columns, delimiter and encoding, as far as the request names no other.

    Raises:
        ConfigError: The request has both a task and a file, or its task has other labels.
        DataError: The data cannot be loaded.
    """
    name, count, names = described["name"], described["num_labels"], described.get("label_names")
    if request.data is None:
        if request.task is None and name not in GLUE:
            raise ConfigError("the delta was trained on texts of your own; give --data, the file to evaluate it on.")
        return SequenceTask(
            _same_labels(load_glue(request.task or name, request.data_dir, need_train=False), described)
        )
    if request.task is not None:
        raise ConfigError("give either --task or --data, not both.")
    trained = name in GLUE and GLUE[name].num_labels == count
    metrics = GLUE[name].metrics if trained else default_metrics(count)
    columns, files = described["text_columns"], described.get("files", {})
    spec = TaskSpec(name, tuple(columns), count, tuple(names) if names else None, metrics, metrics[0])
    examples, notes = load_evaluation(
        spec,
        request.data,
        request.text or columns[0],
        request.label or files.get("label", "label"),
        request.text_pair or (columns[1] if len(columns) > 1 else None),
        form=TextFormat(
            request.delimiter or files.get("delimiter"), request.encoding or files.get("encoding", "utf-8")
        ),
        drop_missing=request.drop_missing,
    )
    return SequenceTask(TaskData(spec, Examples([], None, []), {"eval": examples}, notes))


def _same_labels(data: TaskData, described: Mapping[str, Any]) -> TaskData:
    """Refuses a task whose labels are not those of the head, and notes that a task is another than the head's.

    Raises:
        ConfigError: The labels differ in number or in name.
    """
    spec, names = data.spec, described.get("label_names")
    theirs = f"{described['num_labels']} labels" + (f" ({', '.join(names)})" if names else "")
    ours = f"{spec.num_labels} labels" + (f" ({', '.join(spec.label_names)})" if spec.label_names else "")
    named = names is not None and spec.label_names is not None and not _plain(names)
    if spec.num_labels != described["num_labels"] or (named and list(spec.label_names or ()) != list(names or ())):
        raise ConfigError(
            f"task {spec.name!r} has {ours}; the head was trained on {described['name']!r} with {theirs}, so its scores there "
            "would mean nothing. Evaluate it on that task, or give --data with labels of these names."
        )
    if spec.name == described["name"]:
        return data
    note = (
        f"the head was trained on {described['name']!r} and is scored on {spec.name!r}: read the figures as a transfer"
    )
    return replace(data, notes=(note, *data.notes))


def _plain(names: Sequence[str]) -> bool:
    """Returns True for names that say nothing: the ids, or what transformers calls a class without a name."""
    return all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(names))


SEQUENCE = Kind("sequence", load, reload)
