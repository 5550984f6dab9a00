"""Builds models with random weights, and batches for them. Nothing here reaches a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import ConfigError, need
from unmask.lab.bench.rows import RAMP
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.shapes import SHAPES, Shape

Batch = Mapping[str, Tensor]
BATCHES = RAMP  # The steps take these batches in turn; each batch serves one step of the ramp.
_CLASSES = 2
_SPECIAL = 5  # Token ids below this one are special in some vocabulary; RoBERTa's padding shifts its positions.
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "classifier_dropout")


class Blueprint:
    """Builds one model, every time with the same config and the same random weights.

    Attributes:
        shape: The name, batch and length. Its ``dims`` are empty if the config was read from a file.
        config: The transformers config.
        causal: True for a causal language model, False for a classifier of two classes.
        device: The device of the run.
        dtype: The dtype of the weights.
        seed: The seed of the weights, the batches and the random masks.

    Raises:
        ConfigError: The sequences are longer than the model's position embeddings.
    """

    def __init__(self, shape: Shape, config: Any, model_class: Any, settings: BenchSettings) -> None:
        self.shape, self.config, self._model_class = shape, config, model_class
        self.causal = model_class.__name__.endswith("CausalLM")
        self.device = device_of(settings)
        self.dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
        self.seed = settings.seed
        for name in _DROPOUTS if settings.dropout is not None else ():
            if hasattr(config, name):
                setattr(config, name, settings.dropout)
        positions = getattr(config, "max_position_embeddings", None)
        if positions and shape.length > positions:
            raise ConfigError(f"seq_len = {shape.length}; {shape.name} has room for at most {positions} positions.")

    def build(self) -> nn.Module:
        """Returns a new model in training mode, on the run's device and in its dtype."""
        torch.manual_seed(self.seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return self._model_class(self.config).train()
        finally:
            torch.set_default_dtype(before)

    def batches(self) -> list[Batch]:
        """Returns `BATCHES` fixed random batches.

        Each holds int64 ``input_ids`` and ``attention_mask`` of shape (batch, length). ``labels`` are the ``input_ids`` of
        a causal language model, otherwise int64 of shape (batch,).
        """
        draw = torch.Generator().manual_seed(self.seed)
        size = (self.shape.batch, self.shape.length)
        batches: list[Batch] = []
        for _ in range(BATCHES):
            ids = torch.randint(min(_SPECIAL, self.config.vocab_size - 1), self.config.vocab_size, size, generator=draw)
            labels = ids if self.causal else torch.randint(_CLASSES, size[:1], generator=draw)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            batches.append({name: tensor.to(self.device) for name, tensor in batch.items()})
        return batches

    def describe(self) -> dict[str, Any]:
        """Returns the model's size, its batch and its dropout as JSON values."""
        with torch.device("meta"):
            model = self._model_class(self.config)
        return {
            "name": self.shape.name,
            "class": self._model_class.__name__,
            "dimensions": dict(self.shape.dims),
            "parameters": sum(p.numel() for p in model.parameters()),
            "attention": getattr(model.config, "_attn_implementation", None),
            "batch_size": self.shape.batch,
            "seq_len": self.shape.length,
            "tokens": self.shape.batch * self.shape.length,
            "dropout": {name: getattr(self.config, name) for name in _DROPOUTS if hasattr(self.config, name)},
        }


def blueprint(settings: BenchSettings) -> Blueprint:
    """Returns the blueprint of the model that the settings name.

    Raises:
        ConfigError: A folder or a cached model has no readable config, or its model is neither a classifier nor a causal
            language model.
        MissingExtraError: transformers is not installed.
    """
    transformers = need("transformers", "bench")
    shape = SHAPES.get(settings.model)
    if shape:
        config, causal = transformers.AutoConfig.for_model(shape.family, **shape.dims), shape.family == "llama"
    else:
        shape = Shape(Path(settings.model).name, "config", {})
        try:
            config = transformers.AutoConfig.from_pretrained(settings.model, local_files_only=True)
        except (OSError, ValueError) as error:
            hint = (
                "" if Path(settings.model).is_dir() else " and it is not in the local hub cache (nothing is downloaded)"
            )
            raise ConfigError(f"model {settings.model!r} has no readable config{hint}: {error}") from error
        causal = any(name.endswith("CausalLM") for name in config.architectures or ())
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    if type(config) not in auto._model_mapping:
        raise ConfigError(
            f"model {settings.model!r} ({config.model_type}) is neither a causal LM nor a classifier; give another model."
        )
    config._name_or_path = ""  # The weights are random, so the record must not name the checkpoint.
    if not causal:
        config.num_labels = _CLASSES
    return Blueprint(settings.sized(shape), config, auto._model_mapping[type(config)], settings)


def device_of(settings: BenchSettings) -> torch.device:
    """Returns the device of a run.

    Raises:
        ConfigError: The settings ask for ``cuda`` and there is no CUDA device.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no CUDA device; use --device cpu, or auto.")
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")
