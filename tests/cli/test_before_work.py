"""Tests that a command refuses what cannot work before it reads data or loads a model, and how it says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from tiny import tiny_model, tiny_world

import unmask
from unmask.cli.methods import WHEN

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and no data: what is refused because of the data was refused too late."""
    root = tmp_path_factory.mktemp("world")
    tiny_model(root / "base")
    return root


REFUSED = {
    "a share above all": (("--budget", "200%"), r"unmask: --budget '200%'; a share must be above 0% and at most 100%"),
    "none": (("--budget", "0"), r"unmask: --budget 0; a count must be a whole number, at least 1"),
    "a float": (("--budget", "1e5"), r"--budget '1e5'; give a count \(320_000, '320K'\)"),
    "more than there is": (
        ("--budget", "1000000"),
        r"--budget 1000000 asks for 1,000,000 weights, but only [\d,]+ are",
    ),
    "a seed": (("--seed", "-3"), r"unmask: --seed -3; it must be a whole number from 0"),
    "a logger": (("--report-to", "wandbb"), r"--report-to 'wandbb'; it must be of .*\(did you mean 'wandb'\?\)"),
    "a pattern without a hit": (("--include", "nosuch"), r"unmask: --include: 'nosuch' is found in no parameter name"),
    "a pattern that is none": (("--exclude", "("), r"unmask: --exclude: '\(' is not a regular expression"),
    "a folder": (("--model", "./nowhere"), r"there is no model folder './nowhere'"),
    "a method": (("--method", "id4"), r"--method 'id4'; .*\(did you mean 'id3'\?\)"),
    "a setting": (("--set", "max_step=3"), r"unknown setting 'max_step'; .*\(did you mean 'max_steps'\?\)"),
    "a heuristic": (("--method", "id3", "--heuristic", "snipp"), r"'snipp'; .*\(did you mean 'snip'\?\)"),
    "a budget of full": (("--method", "full"), r"method 'full' trains every weight, so it has no budget"),
    "a place": (("--output", "/proc/none/run"), r"--output '/proc/none/run' cannot be used"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_training_refuses_it_before_data_are_read(case: str, world: Path) -> None:
    words, message = REFUSED[case]
    given = {"--model": "base", "--data": "nowhere.csv", "--budget": "10", "--output": "run"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    done = run("train", *(word for pair in given.items() for word in pair), cwd=world, check=False)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (world / "run" / "config.yaml").exists()


def test_a_logger_that_is_not_installed_is_refused(world: Path) -> None:
    words = ("train", "--model", "base", "--data", "nowhere.csv", "--budget", "10", "--output", "run")
    done = run(*words, "--report-to", "neptune", cwd=world, check=False)
    assert "--report-to 'neptune': its package is not installed" in done.stderr


def test_a_share_is_checked_against_the_real_head(tmp_path: Path) -> None:
    """The early check knows no number of labels, so it must not refuse a share that the run's own model allows."""
    tiny_world(tmp_path)
    words = ("--data", "train.csv", "--text", "review", "--label", "verdict", "--max-steps", 1, "--output", "run")
    run("train", "--model", "base", *words, "--budget", "100% of eligible", cwd=tmp_path)
    delta = unmask.SparseDelta.load(tmp_path / "run" / "delta.safetensors")
    printed = run("inspect", "run", cwd=tmp_path).stdout
    assert f"{len(delta):,} weights" in printed


def test_help_has_a_short_flag_and_words_are_completed(world: Path) -> None:
    assert "fine-tune" in run("-h", cwd=world).stdout.lower()
    assert "--budget" in run("train", "-h", cwd=world).stdout
    words = {"_UNMASK_COMPLETE": "complete_bash", "COMP_WORDS": "unmask train --bud", "COMP_CWORD": "2"}
    line = [sys.executable, "-m", "unmask"]
    done = subprocess.run(line, env=os.environ | words, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["--budget"]


def test_methods_says_when_to_use_each_and_marks_the_default(world: Path) -> None:
    assert WHEN.keys() == unmask.PRESETS.keys()
    printed = run("methods", cwd=world).stdout
    assert "random_mask *" in printed
    assert "without --method" in printed
