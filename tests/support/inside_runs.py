"""Runs of ``unmask train --into`` on a tiny base, read back from their folders."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import assert_same_tensors, snapshot
from torch import Tensor, nn

import unmask
from unmask.lab.inside import insert, into_of
from unmask.lab.models import load_base

DATA = ("--data", "dev.csv", "--text", "review", "--label", "verdict")


def outputs(model: nn.Module) -> Tensor:
    """Returns the logits of two short texts, without dropout."""
    ids = torch.arange(2 * 9).view(2, 9) % 20
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def delta_of(run_folder: Path) -> unmask.SparseDelta:
    return unmask.SparseDelta.load(run_folder / "delta.safetensors")


def assert_seeds_give_the_same_model(world: Path, kind: str) -> Tensor:
    """Asserts that a run's delta gives one model, for two seeds of the head and the added modules; returns its outputs."""
    delta = delta_of(world / kind)
    into = into_of(delta)
    assert into is not None
    models = []
    for seed in (1, 2):
        model, _, missing = load_base(str(world / "base"), 2, seed)
        models.append(insert(model, into, missing, seed).model)
        delta.apply(models[-1])
    assert_same_tensors(snapshot(models[0]), snapshot(models[1]))
    assert torch.equal(outputs(models[0]), outputs(models[1]))
    return outputs(models[0])
