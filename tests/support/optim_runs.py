"""Holds the runs that the tests of `SelectiveAdamW` share."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_tensors, batches, mlp

import unmask
from unmask import SelectiveAdamW

BOTH = pytest.mark.parametrize("bias_correction", ["global", "entry"])
DOUBLE = torch.float64
LR, BETAS, EPS = 0.05, (0.9, 0.999), 1e-8

METHODS = {
    "id3": lambda: unmask.id3(101, steps=20),
    "id3_strided": lambda: unmask.id3(101, steps=20, stride=3),
    "repeat_d3": lambda: unmask.repeat_d3(101),
    "repeat_d3_strided": lambda: unmask.repeat_d3(101, stride=3),
    "repeat_d3_kept": lambda: unmask.repeat_d3(40, stride=3, leaving="kept"),
    "random_increment": lambda: unmask.random_mask(101).but(
        strategy="increment", schedule=unmask.Schedule.of("uniform", 20)
    ),
    "pafi": lambda: unmask.pafi(101),
    "full": lambda: unmask.full(),
}


PAIRS = [(method, torch.float32) for method in METHODS] + [
    (method, dtype) for method in ("id3", "repeat_d3") for dtype in (DOUBLE, torch.bfloat16)
]
CASES = pytest.mark.parametrize(("method", "dtype"), PAIRS, ids=str)


def begin(method="id3", dtype=torch.float32, make=SelectiveAdamW, dense="^4", **settings):
    torch.manual_seed(0)
    model = mlp(width=12, dtype=dtype)
    chosen = METHODS[method]()
    selection = unmask.select(model, chosen, dense=None if chosen.whole else dense)
    return model, selection, make(selection.parameters(), **{"lr": LR, "betas": BETAS, "eps": EPS} | settings)


def data(count, dtype=torch.float32):
    return batches(count, width=12, dtype=dtype)


def square(model, x):
    """Computes `mean_square` entirely in the model's own precision."""
    return model(x).square().mean()


def fused(params, **settings):
    return torch.optim.AdamW(params, fused=True, **settings)


def assert_same_state(left, right):
    for p, q in zip(left.param_groups[0]["params"], right.param_groups[0]["params"], strict=True):
        assert_same_tensors(left.state[p], right.state[q])
