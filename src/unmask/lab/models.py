"""Loads base models with the head of a task, also from what a delta's metadata say of its task."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from unmask.delta.delta import SparseDelta
from unmask.errors import ConfigError, DeltaError
from unmask.lab.inside import insert, into_of
from unmask.reading import Form, count, fields, items, optional, refusing, text

Head = Literal["sequence", "token", "generation"]
HEADS: Mapping[Head, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "generation": AutoModelForCausalLM,
}
"""The Auto class that loads a base, by the kind of task."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' load report (which says that a new head got a random init), because unmask reports it itself."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def load_base(
    source: str,
    num_labels: int | None,
    seed: int,
    head: Head = "sequence",
    label_names: Sequence[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """Loads a base with a task's head, in float32.

    Args:
        source: A folder or a hub id.
        num_labels: The number of the head's outputs; 1 for regression; None for the checkpoint's own head (generation).
        seed: The seed of the head's random init, if the checkpoint has no head.
        head: A key of `HEADS`.
        label_names: The names of the labels, for the model's config.

    Returns:
        The model, its tokenizer, and the names of the tensors that the checkpoint lacks.

    Raises:
        ConfigError: The model cannot be loaded, or its tokenizer has more tokens than its embedding has rows.
    """
    refuse_no_folder(source)
    labels: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if num_labels is not None and head == "sequence":  # by this a pipeline knows that it must not squash a regression
        labels["problem_type"] = "regression" if num_labels == 1 else "single_label_classification"
    if label_names is not None:
        names = dict(enumerate(label_names))
        labels |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    torch.manual_seed(seed)
    try:
        with quiet():
            model, info = HEADS[head].from_pretrained(source, dtype=torch.float32, output_loading_info=True, **labels)
            tokenizer = AutoTokenizer.from_pretrained(source)
            if head == "token" and getattr(tokenizer, "add_prefix_space", None) is False:
                # A byte-level vocabulary (such as RoBERTa's) has a word's usual piece only after a blank.
                tokenizer = AutoTokenizer.from_pretrained(source, add_prefix_space=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model {source!r} cannot be loaded: {error}") from error
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    beyond = {} if rows is None else {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        named = ", ".join(repr(token) for token in sorted(beyond, key=beyond.__getitem__)[:3])
        raise ConfigError(
            f"the tokenizer of {source!r} has {len(beyond):,} tokens ({named}{', ...' if len(beyond) > 3 else ''}) beyond the "
            f"{rows:,} rows of the model's embedding. Enlarge it and save both: model.resize_token_embeddings(len(tokenizer)); "
            "model.save_pretrained(folder); tokenizer.save_pretrained(folder). Then give that folder."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, sorted(info["missing_keys"])


def empty_model(source: str, head: Head) -> PreTrainedModel:
    """Makes a model with a head on the meta device from its configuration alone: names and shapes without weights.

    The head has two labels, or those that the configuration names.

    Raises:
        ConfigError: There is no such model, or its configuration cannot be read.
    """
    shape = read_config(source)
    try:
        with quiet(), torch.device("meta"):
            return cast(PreTrainedModel, HEADS[head].from_config(shape))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model {source!r} cannot be loaded: {error}") from error


def read_config(source: str) -> Any:
    """Returns a model's configuration, of transformers.

    Raises:
        ConfigError: There is no such model, or its configuration cannot be read.
    """
    refuse_no_folder(source)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model {source!r} cannot be loaded: {error}") from error


def refuse_no_folder(source: str) -> None:
    """Refuses a source that is written as a folder and is none.

    Raises:
        ConfigError: There is no such folder.
    """
    if os.sep in source and not Path(source).is_dir() and (Path(source).is_absolute() or source.startswith(".")):
        raise ConfigError(f"there is no model folder {source!r}; give a folder with config.json, or a hub id.")


def on_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """Moves a model to this machine's accelerator, if it has one; returns the model."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model if device is None else model.to(device)  # type: ignore[arg-type, return-value]


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """Returns the longest input in tokens: ``wanted``, or fewer if the model or its tokenizer allows fewer."""
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min([wanted, *(int(limit) for limit in limits if limit and limit > 0)])


def task_of(delta: SparseDelta) -> Mapping[str, Any]:
    """Returns what a delta's metadata say of the task that the delta was trained on.

    Raises:
        DeltaError: The metadata name no task, because the delta was not made by ``unmask train``, or they are damaged.
    """
    task = delta.provenance.task
    if not isinstance(task, Mapping):
        raise DeltaError(
            "the delta does not say which task it was trained on (it was not made by `unmask train`); load the base model "
            "yourself and call delta.apply(model)."
        )
    with refusing(DeltaError, "the delta's description of its task", "Take another copy of the delta."):
        _TASKS[head_of(task)](task, "task")
    return task


_FILES = fields({}, {"text": text, "label": text, "delimiter": optional(text), "encoding": text})
_TASKS: Mapping[Head, Form] = {
    "sequence": fields(
        {"name": text, "text_columns": items(text), "num_labels": count, "max_length": count},
        {"label_names": optional(items(text)), "files": _FILES},
    ),
    "token": fields(
        {"name": text, "num_labels": count, "label_names": items(text), "types": items(text), "max_length": count},
        {"files": _FILES},
    ),
    "generation": fields({"name": text}, {"prompt": text, "max_length": count, "max_new_tokens": count}),
}


def head_of(task: Mapping[str, Any]) -> Head:
    """Returns the kind of the task that a delta's metadata describe. The oldest deltas name no kind and classify texts.

    Raises:
        DeltaError: This version of unmask does not know the kind.

    Example:
        >>> head_of({"kind": "token"}), head_of({})
        ('token', 'sequence')
    """
    kind = task.get("kind", "sequence")
    if not isinstance(kind, str) or kind not in HEADS:
        raise DeltaError(f"the delta was trained on a task of kind {kind!r}; this unmask knows {', '.join(HEADS)}.")
    return cast(Head, kind)


def load_tuned(source: str, delta: SparseDelta) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the base of a delta, adds what the run added to it, and applies the delta.

    The model is in evaluation mode.

    Raises:
        ConfigError: The base cannot be loaded.
        DeltaError: The delta names no task, or it does not fit the base.
    """
    task = task_of(delta)
    head = head_of(task)
    model, tokenizer, missing = load_base(source, task.get("num_labels"), 0, head, task.get("label_names"))
    into = into_of(delta)
    if into is not None:
        model = insert(model, into, missing, seed=0).model  # the delta overwrites the init
    delta.apply(model)
    return model.eval(), tokenizer
