"""Tests TRL's trainers with nothing but ``peft_config=SelectiveConfig(...)``."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_tensors, snapshot
from peft_nets import OLD_NAMES
from trainers import frozen_garbage  # noqa: F401
from trl_runs import BUDGET, dpo, grpo, llama, sft

import peft
import unmask.peft

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings(OLD_NAMES),
]


def config(**changes) -> unmask.peft.SelectiveConfig:
    return unmask.peft.SelectiveConfig(
        **{"task_type": "CAUSAL_LM", "budget": BUDGET, "target_modules": "all-linear"} | changes
    )


def adapter_of(model: peft.PeftModel):
    return model.base_model.deltas.active


@pytest.mark.parametrize("build", [sft, dpo, grpo])
def test_exactly_the_budget_changes(build, tmp_path):
    trainer = build(tmp_path, llama(), peft_config=config(), gradient_accumulation_steps=2, max_grad_norm=0.1)
    trainer.train()
    adapter = adapter_of(trainer.model)
    assert (adapter.used, adapter.step, trainer.state.global_step) == (BUDGET, 4, 4)
    assert all(row["grad_norm"] > 0 for row in trainer.state.log_history if "grad_norm" in row)
    base = dict(llama().named_parameters())
    changed = sum(int((p != base[name]).sum()) for name, p in trainer.model.get_base_model().named_parameters())
    assert changed == BUDGET
    assert_same_tensors(snapshot(llama()), snapshot(trainer.model.unload()))


@pytest.mark.parametrize("build", [dpo, grpo])
def test_the_reference_of_a_trained_adapter_is_that_adapter(build, tmp_path):
    """TRL copies the adapter to one named ref, and activates that one between the policy's forward and its backward."""
    first = sft(tmp_path / "sft", llama(dropout=0.0), peft_config=config(), learning_rate=0.5)
    first.train()
    first.model.save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(llama(dropout=0.0), tmp_path / "adapter", is_trainable=True)
    trained = snapshot(model.get_base_model())
    trainer = build(tmp_path / "next", model, gradient_accumulation_steps=2, max_steps=2, beta=0.1)
    trainer.train()
    adapters = model.base_model.deltas.adapters
    assert set(adapters) == {"default", "ref"}
    assert adapters["default"].step == 6
    if build is dpo:  # at the first step the policy is the reference, so the loss is log 2
        assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert any(not torch.equal(p, trained[name]) for name, p in model.get_base_model().named_parameters())
    model.set_adapter("ref")
    assert_same_tensors(trained, snapshot(model.get_base_model()))
