"""Tests `unmask train --avoid`: three tasks on one base, whose deltas add to one body."""

from __future__ import annotations

import pytest
import torch
from commands import Done, run, train_words
from tiny import tiny_world, toy_csv

import unmask
from unmask import SparseDelta
from unmask.lab.models import load_base, load_tuned

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

BUDGET = ("--set", "scope=linear", "--method", "random_mask")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = tiny_world(tmp_path_factory.mktemp("avoid"))
    toy_csv(world / "other.csv", seed=5)
    return world


def trained(world, name, *words) -> SparseDelta:
    if not (world / name).is_dir():
        run(*train_words(name, *BUDGET, *words), cwd=world)
    return SparseDelta.load(world / name / "delta.safetensors")


def test_runs_that_avoid_each_other_add_up(world):
    a = trained(world, "a")
    b = trained(world, "b", "--avoid", "a/delta.safetensors", "--seed", 1)
    c = trained(world, "c", "--avoid", "a/delta.safetensors,b/delta.safetensors")
    bodies = []
    for own in (a, b, c):
        merged = unmask.combine(a, b, c, heads=own)
        assert len(merged) == len(a) + len(b) + len(c)
        model, _ = load_tuned(str(world / "base"), merged)  # the task is that of ``own``
        for name, tensor in own.whole.items():
            assert model.state_dict()[name].equal(tensor), name
        bodies.append({n: t for n, t in model.state_dict().items() if n not in own.whole})
    base, _, _ = load_base(str(world / "base"), 2, 0)
    changed = sum(int((tensor != base.state_dict()[name]).sum()) for name, tensor in bodies[0].items())
    assert 0 < changed <= len(a) + len(b) + len(c)
    for other in bodies[1:]:
        for name, tensor in other.items():
            assert tensor.equal(bodies[0][name]), name
    assert torch.equal(
        bodies[0]["bert.embeddings.word_embeddings.weight"], base.state_dict()["bert.embeddings.word_embeddings.weight"]
    )


def test_a_run_goes_on_with_the_deltas_that_it_avoids(world):
    trained(world, "a")
    words = ("--avoid", "a/delta.safetensors", "--set", "eval_steps=8", "--seed", 1)
    straight = trained(world, "straight", *words)
    run(*train_words("stopped", *BUDGET, *words), cwd=world)
    for file in ("delta.safetensors", "summary.json"):
        (world / "stopped" / file).unlink()
    run("train", "--config", "stopped/config.yaml", "--resume", cwd=world)
    again = SparseDelta.load(world / "stopped" / "delta.safetensors")
    assert {n: e.values.tolist() for n, e in again.sparse.items()} == {
        n: e.values.tolist() for n, e in straight.sparse.items()
    }
    (world / "stopped" / "delta.safetensors").unlink()
    other: Done = run(
        "train", "--config", "stopped/config.yaml", "--avoid", "b.safetensors", "--resume", cwd=world, check=False
    )
    assert "avoid" in other.stderr
