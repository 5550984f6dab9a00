"""Tests the GRPO example: a trainer and a rollout process, on a tiny model, have the same logits after every sync."""

from __future__ import annotations

import argparse

import pytest
from helpers import ROOT
from tiny_llama import addition, save_llama

from unmask.files import write_json

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]

STEPS, BUDGET = 3, 90


@pytest.fixture
def example(monkeypatch):
    """Imports the example by its name, under which its rollout process finds it too."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import grpo_sync

    return grpo_sync


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "AddSub").mkdir()
    write_json(tmp_path / "AddSub" / "test.json", addition(8))
    model = str(save_llama(tmp_path / "model"))
    settings = {"model": model, "data_dir": str(tmp_path), "budget": str(BUDGET), "steps": STEPS, "problems": 8}
    return argparse.Namespace(**settings, batch_size=4, generations=2, tokens=6, lr=1e-2)


def letters(completions, **_):
    """Rewards letters, of which a model with random weights writes some; it writes no answer."""
    return [float(sum(c.isalpha() for c in completion[-1]["content"])) for completion in completions]


@pytest.mark.parametrize("row", ["id3", "random_mask"])
def test_both_processes_have_the_same_logits_after_every_step_of_grpo(example, arguments, row):
    figures = example.train(arguments, row, [letters])
    assert all(sync["equal"] for sync in [figures["first"], *figures["steps"]])
    assert figures["changed"] == [True] * STEPS, "the rollout process generates with other weights after each step"
    assert figures["weights"] == BUDGET
    sizes = [step["bytes"] for step in figures["steps"]]
    if row == "random_mask":
        assert sizes == [128 + -(-2 * BUDGET // 8) * 8] * STEPS  # a header, and values in bfloat16
    else:
        assert min(sizes) > 128 + 2 * BUDGET // STEPS  # new positions come with each step


def test_a_merged_lora_is_no_longer_what_was_trained(example, arguments):
    """The rounding of a merged LoRA is what the example reports; a LoRA that is sent as an adapter has none."""
    figures = example.train(arguments, "lora_32_merged", [letters])
    assert not all(step["equal"] for step in figures["steps"])
    assert figures["drifted"] > 0
    plain = sum(p.numel() for p in example.load(arguments.model).parameters())
    assert figures["steps"][0]["bytes"] == 2 * plain


def test_the_rewards_are_for_the_right_number(example):
    said = [[{"content": text}] for text in ("The answer is 96.", "It is 48", "None", "1/2 of 192 = 96")]
    gold = ["96"] * 4
    assert example.right(said, gold) == [1, 0, 0, 1]
    assert example.near(said, gold) == pytest.approx([0.5, 1 / 3, 0, 0.5])
