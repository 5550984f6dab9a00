"""Tests the PEFT method in transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensors, snapshot
from models import bert_classifier
from peft_nets import NO_BASE_FILE, OLD_NAMES, base_state, optimizer_of, run, wrapped
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import peft
import unmask.peft

pytestmark = [
    pytest.mark.filterwarnings(OLD_NAMES),
    pytest.mark.filterwarnings(NO_BASE_FILE),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]


def base() -> BertForSequenceClassification:
    return bert_classifier(64, num_hidden_layers=1, initializer_range=0.02)


def data() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(64, (6,), generator=generator), "labels": i % 2} for i in range(24)]


def trained(folder: Path, **arguments: object) -> peft.PeftModel:
    given = unmask.peft.SelectiveConfig(task_type="SEQ_CLS", budget=60, target_modules="all-linear")
    model = peft.get_peft_model(base(), given)
    settings: dict = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    training = TrainingArguments(str(folder), **{**settings, "save_strategy": "no", **arguments})
    Trainer(model, training, train_dataset=data(), eval_dataset=data()[:8]).train()
    return model


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"num_train_epochs": 2}, 12),
        ({"max_steps": 5}, 5),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 3}, 2),
    ],
)
def test_the_trainer_fills_in_total_steps(tmp_path, arguments, steps):
    model = trained(tmp_path, **arguments)
    adapter = model.base_model.deltas.active
    assert (model.peft_config["default"].total_steps, adapter.step, adapter.used) == (steps, steps, 60)


def test_the_trainer_saves_adapters_and_loads_the_best(tmp_path):
    model = trained(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", save_only_model=True,
    )  # fmt: skip
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved == ["checkpoint-2", "checkpoint-4"]
    loaded = [peft.PeftModel.from_pretrained(base(), tmp_path / name) for name in saved]
    assert any(all(torch.equal(t, base_state(m)[n]) for n, t in base_state(model).items()) for m in loaded)
    assert_same_tensors(snapshot(base()), snapshot(model.unload()))


def test_the_trainer_clips_the_norm_of_what_is_trained(tmp_path):
    tight = trained(tmp_path / "a", max_steps=2, max_grad_norm=1e-6, optim="sgd")
    loose = trained(tmp_path / "b", max_steps=2, max_grad_norm=0.0, optim="sgd")

    def moved(model: peft.PeftModel) -> float:
        slots = model.base_model.deltas.active.slots()
        return float((slots.values - slots.base)[: slots.used].norm())

    assert moved(tight) < 1e-6 < moved(loose)


def test_training_goes_on_after_the_values_were_moved():
    """Moving ends the live selection, and the next forward starts a new one. The run stays the same, bit for bit."""
    (_, model), (_, alone) = wrapped(), wrapped()
    optimizer, other = optimizer_of(model), optimizer_of(alone)
    for seed in range(4):
        model.base_model.deltas.active.move()
        run(model, 1, optimizer, seed)
        run(alone, 1, other, seed)
    assert_same_tensors(base_state(alone), base_state(model))
