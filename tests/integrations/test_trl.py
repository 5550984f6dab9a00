"""Tests TRL's trainers on a selection, without PEFT."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same_tensors, assert_unselected_is_base, snapshot
from trainers import frozen_garbage, id3  # noqa: F401
from trl_runs import BUDGET, dpo, grpo, llama, sft

import unmask
from unmask.integrations.trainer import SelectiveCallback

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def with_callback(trainer, method=None, **options):
    callback = SelectiveCallback(trainer, method or id3(BUDGET), **options)
    trainer.add_callback(callback)
    return callback


@pytest.mark.parametrize("build", [sft, dpo, grpo])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_exactly_the_budget_changes_and_the_rest_is_bitwise_the_base(build, accumulation, tmp_path):
    model = llama()
    base = snapshot(model)
    trainer = build(tmp_path, model, gradient_accumulation_steps=accumulation, max_grad_norm=0.1)
    callback = with_callback(trainer)
    trainer.train()
    selection = callback.live
    assert (selection.used, selection.step, trainer.state.global_step) == (BUDGET, 4, 4)
    assert_unselected_is_base(model, base, selection)
    assert sum(int((base[name] != now).sum()) for name, now in named(model).items()) == BUDGET
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def named(model):
    """Returns each tensor once, even if the model ties some."""
    return {name: p.detach() for name, p in model.named_parameters()}


def test_dense_tensors_clipping_by_the_whole_norm_and_the_delta_work_together(tmp_path):
    model = llama()
    base = snapshot(model)
    trainer = sft(tmp_path, model, max_grad_norm=0.01, gradient_accumulation_steps=2)
    callback = with_callback(trainer, dense=r"^model\.norm", clip_scope="all", accumulation="exact")
    trainer.train()
    trained = {"model.norm.weight": snapshot(model)["model.norm.weight"]}
    assert not torch.equal(trained["model.norm.weight"], base["model.norm.weight"])
    assert_unselected_is_base(model, base | trained, callback.live)
    delta = callback.live.delta()
    callback.live.release()
    fresh = llama()
    delta.apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(model))


def test_grpo_generates_with_the_weights_that_are_being_trained(tmp_path):
    """The completions of step 2 depend on the changes of step 1."""
    completions = []
    for lr in (0.0, 0.5):
        trainer = grpo(tmp_path, llama(), learning_rate=lr, max_steps=2, lr_scheduler_type="constant")
        kept = []
        reward = trainer.reward_funcs[0]
        trainer.reward_funcs[0] = lambda completions, reward=reward, kept=kept, **k: (
            kept.append(completions) or reward(completions, **k)
        )
        with_callback(trainer, unmask.id3(400, steps=2))
        trainer.train()
        completions.append(kept)
    assert completions[0][0] == completions[1][0]
    assert completions[0][1] != completions[1][1]
