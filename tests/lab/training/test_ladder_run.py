"""Tests `unmask train --ladder`: the rungs are the deltas of the run at their steps, also of a run that was stopped."""

from __future__ import annotations

import pytest
from commands import run, train_words
from tiny import tiny_world

import unmask
from unmask import Ladder, SparseDelta
from unmask.lab.training.ladder import rung_steps
from unmask.lab.training.run_folder import RunFolder
from unmask.lab.training.series import deltas

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

KEPT = ("--set", "eval_steps=8", "--set", "keep_checkpoints=none")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = tiny_world(tmp_path_factory.mktemp("ladder"))
    run(*train_words("run", *KEPT, "--ladder", 3), cwd=world)
    return world


def test_a_rung_is_the_delta_of_its_step(world, monkeypatch):
    ladder = Ladder.load(world / "run" / "ladder.safetensors")
    assert ladder.budgets == [40, 80, 120]
    assert ladder.rungs[-1] == SparseDelta.load(world / "run" / "delta.safetensors")
    assert not (world / "run" / "rungs").exists()
    monkeypatch.chdir(world)  # the run's data have relative paths
    for step, expected in deltas(RunFolder(world / "run"), [8, 16, 24]):
        rung = ladder.rungs[step // 8 - 1]
        assert (rung.provenance.step, rung.base) == (step, expected.base)
        assert rung == SparseDelta(expected.sparse, expected.whole, expected.base, rung.metadata, rung.places)
    assert ladder.at(80) == ladder.rungs[1]


def test_the_ladder_does_not_change_the_run(world):
    run(*train_words("plain", *KEPT), cwd=world)
    plain, laddered = (SparseDelta.load(world / name / "delta.safetensors") for name in ("plain", "run"))
    assert plain == SparseDelta(laddered.sparse, laddered.whole, laddered.base, plain.metadata, laddered.places)


@pytest.mark.parametrize("lost", ["delta.safetensors", "ladder.safetensors"])
def test_a_run_that_goes_on_writes_the_same_ladder(world, lost):
    """Either it finds the rungs that it has written, or the ladder, if it had finished and a file was lost."""
    name = f"stopped-{lost.partition('.')[0]}"
    run(*train_words(name, *KEPT, "--ladder", 3), cwd=world)
    folder, expected = world / name, Ladder.load(world / "run" / "ladder.safetensors")
    (folder / "summary.json").unlink()
    (folder / lost).unlink()
    if lost == "ladder.safetensors":
        (folder / "rungs").mkdir()
        for step, rung in zip((8, 16), expected.rungs, strict=False):
            rung.save(folder / "rungs" / f"step-{step}.safetensors")
    run("train", "--config", f"{name}/config.yaml", "--resume", cwd=world)
    for rung, other in zip(Ladder.load(folder / "ladder.safetensors").rungs, expected.rungs, strict=True):
        assert rung == SparseDelta(other.sparse, other.whole, other.base, rung.metadata, other.places)


def test_a_rung_is_written_and_listed(world):
    listed = run("delta", "run/ladder.safetensors", "--list", cwd=world).stdout.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["8", "40"], ["16", "80"], ["24", "120"]]
    done = run("delta", "run/ladder.safetensors", "--step", 16, "--output", "small.safetensors", cwd=world)
    assert "step 16: 80 weights unmasked by then (budget 120)" in done.stdout
    assert SparseDelta.load(world / "small.safetensors") == Ladder.load(world / "run/ladder.safetensors").at(80)
    for words, error in (
        (("--step", 9), "has no rung of step 9; it has those of 8, 16, 24"),
        (("--base", "base"), "a ladder holds its deltas as they are"),
        (("--output", "small.safetensors"), "exists already"),
    ):
        refused = run("delta", "run/ladder.safetensors", *words, cwd=world, check=False)
        assert refused.returncode != 0
        assert error in " ".join(refused.stderr.split())
    done = run(
        "eval", "base", "small.safetensors", "--data", "dev.csv", "--text", "review", "--label", "verdict", cwd=world
    )
    assert "accuracy" in done.stdout


@pytest.mark.parametrize(
    ("method", "steps", "rungs", "expected"),
    [
        (unmask.id3(100, steps=20), 20, 5, [4, 8, 12, 16, 20]),
        (unmask.id3(100, steps=20, stride=10), 20, 4, [1, 11, 20]),
        (unmask.id3(100, steps=20, schedule="at-once"), 20, 4, [1, 20]),
        (unmask.random_mask(100), 10, 5, [2, 4, 6, 8, 10]),
        (unmask.random_mask(100), 3, 5, [1, 2, 3]),
        (unmask.random_mask(100), 10, 1, [10]),
    ],
)
def test_the_steps_of_the_rungs(method, steps, rungs, expected):
    assert rung_steps(method, 100, steps, rungs) == expected
