"""Checks transformers' quantised models: the page's example, the Trainer, checkpoints, merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import bert_classifier
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    TrainingArguments,
)

import unmask
from unmask.cli.apply import run_apply
from unmask.errors import ConfigError
from unmask.integrations.trainer import SelectiveTrainer
from unmask.quantised import dequantise_and_merge
from unmask.quantised.layers import has_sidecars

pytest.importorskip("bitsandbytes")

EXAMPLES = [{"input_ids": torch.arange(i, i + 12) % 50, "labels": i % 2} for i in range(32)]
KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Makes a float checkpoint of a tiny BERT with its head."""
    path = tmp_path_factory.mktemp("bert")
    bert_classifier(hidden_size=64, intermediate_size=128, initializer_range=0.02).save_pretrained(path)
    return str(path)


def load(folder: str, kind: str):
    skip = {"llm_int8_skip_modules": ["classifier"]}
    if kind == "int8":
        configuration = BitsAndBytesConfig(load_in_8bit=True, **skip)
    else:
        configuration = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, **skip)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=configuration, dtype=torch.float32, device_map="cpu"
    )


def trainer(model, output: Path, steps: int = 6) -> SelectiveTrainer:
    selection = unmask.select(model, unmask.id3(400, steps=6, stride=2), include="encoder", dense="classifier")
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=8,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
    )
    return SelectiveTrainer(
        model=model, selection=selection, args=arguments, train_dataset=EXAMPLES, optimizers=(optimizer, None)
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.stack([e["input_ids"] for e in EXAMPLES[:4]])).logits


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_checkpoints_resumes_and_travels(kind, folder, tmp_path):
    whole = trainer(load(folder, kind), tmp_path / "whole")
    whole.train()
    assert not getattr(whole.model, "_hf_peft_config_loaded", False)
    resumed = trainer(load(folder, kind), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(resumed.selection.values, whole.selection.values)
    fresh = load(folder, kind)
    whole.selection.delta().apply(fresh)
    assert has_sidecars(fresh)
    assert torch.equal(logits(fresh), logits(whole.model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_saved_as_an_ordinary_one(kind, folder, tmp_path):
    run = trainer(load(folder, kind), tmp_path / "run")
    run.train()
    run.selection.release()
    before = logits(run.model)
    merged = dequantise_and_merge(run.model)
    after = logits(merged)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-2 * before.abs().max().item())
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not getattr(again, "is_quantized", False)
    assert torch.equal(logits(again), after)


def test_a_new_head_must_be_kept_out_of_the_quantisation(folder):
    body = BertForSequenceClassification.from_pretrained(folder).bert
    body.save_pretrained(path := Path(folder) / "body")
    model = AutoModelForSequenceClassification.from_pretrained(
        path,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[]),
        dtype=torch.float32,
        device_map="cpu",
    )
    with pytest.raises(unmask.MethodError, match=r"'classifier.weight' is not quantised yet.*llm_int8_skip_modules"):
        unmask.select(model, unmask.id3(10, steps=2))
    with pytest.raises(unmask.MethodError, match="llm_int8_skip_modules"):
        unmask.select(model, unmask.id3(10, steps=2), dense="classifier")


def test_apply_writes_no_checkpoint_that_lacks_the_delta(folder, tmp_path, monkeypatch):
    run = trainer(load(folder, "nf4"), tmp_path / "run")
    run.train()
    path = run.selection.delta().save(tmp_path / "delta.safetensors")

    def load_tuned(source: str, delta: unmask.SparseDelta):
        model = load(folder, "nf4")
        delta.apply(model)
        return model, None

    monkeypatch.setattr("unmask.lab.models.load_tuned", load_tuned)
    with pytest.raises(ConfigError, match="dequantise_and_merge"):
        run_apply(folder, path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
