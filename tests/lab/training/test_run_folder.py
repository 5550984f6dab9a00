"""Tests the output folder of a run, and the curve in its metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import run, train_words
from tiny import tiny_world

import unmask

# These tests are not about the Trainer's own warnings.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_world(tmp_path_factory.mktemp("world"))
    run(*train_words("run", "--set", "eval_steps=6", "--set", "logging_steps=1"), cwd=root)
    return root


def rows(folder: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def steady(row: dict) -> dict:
    """Removes clock times from a row."""
    return {key: value for key, value in row.items() if "time" not in key and "per_second" not in key}


def test_the_metrics_hold_the_curve_of_score_against_budget(world: Path) -> None:
    curve = [row for row in rows(world / "run") if "eval_loss" in row]
    assert [(row["step"], row["used"]) for row in curve] == [(0, 0), (6, 30), (12, 60), (18, 90), (24, 120)]
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert {key: curve[0][f"eval_{key}"] for key in summary["before"]} == summary["before"]
    assert {key: curve[-1][f"eval_{key}"] for key in summary["after"]} == pytest.approx(summary["after"])


def test_the_summary_names_the_task_and_the_metric_that_runs_are_compared_by(world: Path) -> None:
    summary = json.loads((world / "run" / "summary.json").read_text())
    found = {key: summary[key] for key in ("task", "main_metric", "main", "greater_is_better")}
    main = summary["after"]["accuracy"]
    assert found == {"task": "custom", "main_metric": "accuracy", "main": main, "greater_is_better": True}
    described = unmask.SparseDelta.load(world / "run" / "delta.safetensors").metadata["task"]
    assert described["kind"] == "sequence"


def test_a_killed_run_that_is_resumed_has_every_step_once(world: Path) -> None:
    """The folder is as a kill at step 21 leaves it: it has rows after the last checkpoint, and the last one is cut short."""
    folder = world / "killed"
    shutil.copytree(world / "run", folder)
    whole = rows(folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-24")
    (folder / "delta.safetensors").unlink()
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in whole if row["step"] <= 21)
        file.write('{"step": 2')
    with (folder / "allocation.jsonl").open("a") as file:
        file.write('{"step": 24, "us')
    run("train", "--config", "run/config.yaml", "--set", "output=killed", "--resume", cwd=world)
    assert rows(folder, "allocation.jsonl") == rows(world / "run", "allocation.jsonl")
    untimed = [steady(row) for row in whole if "train_runtime" not in row]
    assert [steady(row) for row in rows(folder) if "train_runtime" not in row] == untimed


def test_overwriting_leaves_nothing_of_the_earlier_run(world: Path) -> None:
    folder = world / "fresh"
    shutil.copytree(world / "run", folder)
    words = ("train", "--config", "run/config.yaml", "--set", "output=fresh", "--set", "max_steps=6")
    refused = run(*words, "--overwrite", "--budget", "99999999", cwd=world, check=False)
    assert refused.returncode == 1
    assert (folder / "delta.safetensors").exists()  # a refused run does not cost the earlier run
    run(*words, "--overwrite", cwd=world)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-6"]
    assert [row["step"] for row in rows(folder) if "eval_loss" in row] == [0, 6]
    assert [row["step"] for row in rows(folder, "allocation.jsonl")] == [1, 6]
