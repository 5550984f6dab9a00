"""Checks which tensors a method may select from."""

from __future__ import annotations

import torch
from helpers import as_lists
from torch import nn

import unmask


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)
        self.attention, self.lstm, self.conv = nn.MultiheadAttention(2, 1), nn.LSTM(2, 2), nn.Conv1d(1, 1, 1)
        self.relative_attention_bias, self.scale = nn.Embedding(2, 2), nn.Parameter(torch.ones(2))
        self.steps = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)


TRUE_BIASES = {
    "linear.bias", "norm.bias", "attention.in_proj_bias", "attention.out_proj.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0",
    "conv.bias",
}  # fmt: skip


def test_bitfit_takes_true_biases_or_every_vector():
    assert set(unmask.select(Zoo(), unmask.bitfit()).indices) == TRUE_BIASES
    assert set(unmask.select(Zoo(), unmask.bitfit(ndim1=True)).indices) == {*TRUE_BIASES, "norm.weight", "scale"}


def test_bitfit_with_a_budget_takes_the_first_names():
    selection = unmask.select(Zoo(), unmask.bitfit(budget=9))
    assert as_lists(selection.indices) == {
        "attention.in_proj_bias": [*range(6)],
        "attention.out_proj.bias": [0, 1],
        "conv.bias": [0],
    }


def test_scopes_and_patterns_compose():
    linear = unmask.select(Zoo(), unmask.pafi(8).but(scope=unmask.Scope("linear")))
    assert set(linear.indices) == {"linear.weight", "attention.out_proj.weight"}
    named = unmask.pafi("100%").but(budget=None, scope=unmask.Scope.patterns(r"^lstm", "scale"))
    selection = unmask.select(Zoo(), named, include=["weight", "bias"], exclude="_hh_")
    assert set(selection.indices) == {"lstm.weight_ih_l0", "lstm.bias_ih_l0"}
    everything = unmask.select(Zoo(), unmask.pafi(1).but(budget=None))
    assert "steps" not in everything.indices
    assert everything.budget == sum(p.numel() for p in Zoo().parameters() if p.is_floating_point())
