"""Makes tiny models, data and Trainers for the tests of training stacks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_classifier
from torch.utils.data import Dataset, SequentialSampler
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import unmask
from unmask.integrations.trainer import SelectiveCallback

VOCABULARY, LENGTH = 31, 7


class Tokens(Dataset):
    """Holds random token sequences, labelled by the parity of their first token."""

    def __init__(self, count: int = 20) -> None:
        self.ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index, 0] % 2}


def bert(width: int = 16, dropout: float = 0.1, seed: int = 0) -> BertForSequenceClassification:
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "max_position_embeddings": LENGTH}
    return bert_classifier(VOCABULARY, seed, **sizes, **drops, initializer_range=0.3)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(**(settings | changes))


class Ordered(Trainer):
    """Takes the data in order, so that a loop by hand can do the same."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def id3(budget: int = 60, **settings: Any) -> Callable[[int], unmask.Method]:
    return lambda steps: unmask.id3(budget, steps, **settings)


def selective(
    folder: Path,
    selective: Any = None,
    model: torch.nn.Module | None = None,
    kind: type[Trainer] = Trainer,
    data: Dataset | None = None,
    options: dict[str, Any] | None = None,
    given: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Trainer, SelectiveCallback]:
    """Returns (the Trainer, its callback) of a selection."""
    trainer = kind(
        model=model or bert(), args=arguments(folder, **changes), train_dataset=data or Tokens(), **(given or {})
    )
    callback = SelectiveCallback(trainer, selective or id3(), **(options or {}))
    trainer.add_callback(callback)
    return trainer, callback


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage() -> Iterator[None]:
    """Freezes the objects of the libraries, so that the two garbage collections of each ``train()`` need not walk them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


SCALE = 2.0**10


class Scaled(Ordered):
    """Trains in float16 with a GradScaler, which accelerate does on GPUs only; some steps overflow."""

    overflows: tuple[int, ...] = ()

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        self.accelerator.scaler.scale(torch.ones(()))

    def training_step(self, *args, **kwargs):
        scale = self.accelerator.scaler._scale
        scale.fill_(torch.inf if self.state.global_step in self.overflows else SCALE)
        loss = super().training_step(*args, **kwargs)
        scale.fill_(SCALE)
        return loss


@pytest.fixture
def half_precision():
    """Resets the precision, which accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def recomputing(on, reentrant):
    """Returns the Trainer's arguments for checkpointing; transformers 5.23 renamed them."""
    kind = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    return {f"{kind}_checkpointing": on, f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}}


def run_out_of_memory(trainer, batches, limit):
    """Makes more than ``limit`` examples not fit from the given training batch on."""
    seen, step = [0], trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        seen[0] += 1
        loss = step(model, inputs, *args, **kwargs)  # the backward has run: a gradient is in flight
        if seen[0] >= batches and len(inputs["labels"]) > limit:
            raise RuntimeError("CUDA out of memory.")
        return loss

    trainer.training_step = training_step
