"""Tests a real sweep on a tiny model: it is killed in a run and started again, and its peers train as many weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from commands import run
from models import bert_config
from tiny import tiny_model, toy_csv

from unmask.analysis import mask_of
from unmask.delta.delta import SparseDelta
from unmask.errors import ConfigError
from unmask.integrations.checkpoints import seal
from unmask.lab.models import load_tuned
from unmask.lab.report import read_study
from unmask.lab.study import Store, expand, read_sweep
from unmask.lab.study.matching import matching_rank
from unmask.lab.study.records import records
from unmask.lab.study.train_cell import train_cell
from unmask.lab.training.run_folder import RunFolder

# The warnings of the Trainer and of peft are not tested here.
pytestmark = pytest.mark.filterwarnings("default")

SWEEP = {
    "name": "tiny",
    "settings": {
        "model": "base", "data": "train.csv", "eval": "dev.csv", "text": "review", "label": "verdict", "budget": "256",
        "batch_size": 16, "max_steps": 12, "eval_steps": 6,
    },
    "axes": {"seed": [0]},
    "methods": {
        "long": {"settings": {"max_steps": 200, "eval_steps": 20}, "grid": {"lr": ["5e-2"]}},
        "id3": {"grid": {"lr": ["1e-2", "5e-2"]}},
        "snip": {"settings": {"method": "static_d3", "heuristic": "snip"}, "grid": {"lr": ["5e-2"]}},
        "lora": {
            "settings": {
                "into": "lora", "method": "full", "lora_r": "match", "lora_alpha": "match", "lora_targets": ["query", "value"]
            },
            "grid": {"lr": ["5e-2"]},
        },
        "shira": {
            "settings": {"into": "shira", "method": "full", "lora_r": "match", "lora_targets": ["query", "value"]},
            "grid": {"lr": ["5e-2"]},
        },
        "full": {"settings": {"method": "full", "budget": None}, "grid": {"lr": ["1e-3"]}},
        "diverging": {"settings": {"method": "full", "budget": None}, "grid": {"lr": ["1e30"]}},
    },
    "choose": {"seeds": [0]},
}  # fmt: skip


def wait_for_checkpoint(folder: Path, parent: subprocess.Popen) -> None:
    until = time.monotonic() + 90
    while not list(folder.glob("runs/*/checkpoints/checkpoint-*/manifest.json")):
        assert parent.poll() is None, "the sweep ended before the kill"
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Makes a folder with a sweep that was killed in its first run, and then started again and run to its end."""
    root = tmp_path_factory.mktemp("world")
    tiny_model(root / "base")
    toy_csv(root / "train.csv", 64, seed=0)
    toy_csv(root / "dev.csv", 32, seed=1)
    (root / "sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    words = ("sweep", "sweep.yaml", "--output", "out", "--threads", "1")
    paths = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, "-c", "from unmask.cli import main; main()", *words],
        cwd=root, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_checkpoint(root / "out", parent)
    parent.kill()
    parent.communicate()
    done = run(*words, cwd=root, check=False)
    return root, done


def result(world, method, lr="5e-2"):
    root, _ = world
    found = Store(root / "out").results().values()
    return next(r for r in found if (r["labels"]["method"], r["labels"]["lr"]) == (method, lr))


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_like_an_uninterrupted_one(world, monkeypatch, tmp_path):
    root, _ = world
    killed = result(world, "long")
    assert killed["resumed_at"] in range(20, 201, 20)
    monkeypatch.chdir(root)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The workers had one thread. Sums in another order would select other weights.
    whole = train_cell(killed["settings"], tmp_path / "whole")
    torch.set_num_threads(threads)
    assert whole["resumed_at"] is None
    deltas = [
        SparseDelta.load(f / "delta.safetensors") for f in (root / "out" / "runs" / killed["id"], tmp_path / "whole")
    ]
    one, two = (mask_of(delta).indices for delta in deltas)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(deltas[0].sparse[name].values, deltas[1].sparse[name].values) for name in one)
    assert killed["score"] == whole["score"]
    assert [point["step"] for point in killed["curve"]] == list(range(0, 201, 20))
    assert killed["curve"] == whole["curve"]
    assert killed["allocation"] == whole["allocation"]
    assert not list((root / "out").glob("runs/*/checkpoints/*"))


def test_a_finished_run_whose_result_was_lost_is_not_trained_again(world, monkeypatch):
    root, _ = world
    monkeypatch.chdir(root)
    done = result(world, "id3")
    metrics = root / "out" / "runs" / done["id"] / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    again = train_cell(done["settings"], metrics.parent)
    assert {key: again[key] for key in ("score", "loss", "curve")} == {
        key: done[key] for key in ("score", "loss", "curve")
    }
    assert metrics.stat().st_mtime_ns == before


def test_the_peers_train_as_many_weights(world):
    root, _ = world
    sweep = read_sweep(root / "sweep.yaml")
    cells = expand(sweep, rank=lambda settings: 2)
    found = {r["method"]: r for r in records(cells, Store(root / "out").results(), sweep.protocol, sweep.choice)}
    assert {
        name: r["budget"] for name, r in found.items() if name not in ("full", "long", "diverging")
    } == dict.fromkeys(("id3", "snip", "lora", "shira"), 256)
    assert found["id3"]["share"] == found["lora"]["share"] == found["shira"]["share"]
    assert found["full"]["share"] == pytest.approx(1, abs=0.01)
    assert (found["id3"]["strategy"], found["snip"]["strategy"], found["lora"]["strategy"]) == (
        "increment",
        "static",
        "none",
    )
    assert [shot["used"] for shot in found["id3"]["allocation"]] == [256 // 12, 128, 256]


def test_a_fresh_model_with_the_delta_of_shira_has_its_score(world):
    root, _ = world
    found = result(world, "shira")
    delta = SparseDelta.load(root / "out" / "runs" / found["id"] / "delta.safetensors")
    assert delta.metadata["into"] == {"kind": "shira", "r": 2, "targets": ["query", "value"], "seed": 0}
    model, tokenizer = load_tuned(str(root / "base"), delta)
    rows = [line.split(",") for line in (root / "dev.csv").read_text().splitlines()[1:]]
    with torch.no_grad():
        logits = model(**tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")).logits
    right = [("bad", "good")[i] == label for i, (_, label) in zip(logits.argmax(-1), rows, strict=True)]
    assert sum(right) / len(right) == found["score"]


def test_a_run_that_diverges_is_recorded_and_the_rest_goes_on(world):
    _, done = world
    failed = result(world, "diverging", "1e30")
    assert failed["status"] == "failed"
    assert failed["error"]["type"] == "NonFiniteGradientError"
    assert done.returncode == 1
    assert "1 runs failed; --retry-failed" in done.stdout


def test_the_command_shows_the_table_and_the_report_reads_the_folder(world):
    root, done = world
    assert "| method | budget |" not in done.stdout  # The budget is no axis here.
    assert "| id3 |" in done.stdout
    assert (
        (root / "out" / "table.md")
        .read_text()
        .startswith("**Lr chosen by loss on seed 0, then mean over seeds**\n\n| method | weights | data |")
    )
    study = read_study(root / "out")
    assert len(study.results) == len(study.cells) == 8
    assert study.command.startswith("unmask sweep sweep.yaml")


def test_a_dry_run_lists_the_runs_and_runs_nothing(world):
    root, _ = world
    done = run(
        "sweep",
        "sweep.yaml",
        "--output",
        "elsewhere",
        "--dry-run",
        "--only",
        "method=id3,snip",
        "--axis",
        "seed=0,1",
        cwd=root,
    )
    assert done.stdout.count("to run") == 4  # The one rate of snip needs no choice.
    assert "if its" in done.stdout
    assert not (root / "elsewhere").exists()
    listed = run("sweep", "sweep.yaml", "--output", "out", "--dry-run", cwd=root).stdout
    assert "failed: " in listed


def test_checkpoints_that_are_not_whole_are_passed_over(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.newest() == (None, [])
    for step, text in ((12, '{"global_st'), (18, None)):
        path = folder.checkpoints / f"checkpoint-{step}"
        path.mkdir(parents=True)
        if text is not None:
            (path / "trainer_state.json").write_text(text)
    (folder.checkpoints / "checkpoint-6").mkdir()
    (folder.checkpoints / "checkpoint-6" / "a").write_text("whole")
    seal(folder.checkpoints / "checkpoint-6", 6, {})
    whole, passed = folder.newest()
    assert whole.step == 6
    assert [found.path.name for found in passed] == ["checkpoint-18", "checkpoint-12"]
    assert all("missing" in found.fault for found in passed)


def test_a_damaged_checkpoint_means_a_fresh_start(world, monkeypatch, tmp_path):
    root, _ = world
    monkeypatch.chdir(root)
    settings = {**result(world, "id3")["settings"]}
    folder = RunFolder(tmp_path / "run")
    broken = folder.checkpoints / "checkpoint-6"
    broken.mkdir(parents=True)
    (broken / "trainer_state.json").write_text(json.dumps({"global_step": 6}))
    made = train_cell(settings, folder.path)
    assert (made["resumed_at"], made["score"]) == (None, result(world, "id3")["score"])
    shutil.rmtree(folder.path)


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    bert_config(hidden_size=32, num_hidden_layers=3, intermediate_size=64).save_pretrained(folder)
    return {"model": str(folder), "task": "rte", "method": "full", "lora_targets": ["query", "value"]}


@pytest.mark.parametrize("into", ["lora", "shira"])
def test_the_rank_comes_nearest_to_the_budget(shape, into):
    unit = 3 * 2 * (32 + 32)  # Each rank adds so many weights.
    for budget, r in ((1, 1), (unit, 1), (unit * 1.4, 1), (unit * 1.6, 2), (5 * unit, 5)):
        assert matching_rank({**shape, "into": into, "budget": str(int(budget))}) == r


def test_the_magnitudes_of_dora_count(shape):
    unit, fixed = 3 * 2 * 64, 3 * 2 * 32
    assert matching_rank({**shape, "into": "dora", "budget": str(4 * unit + fixed)}) == 4


def test_a_share_is_a_share_of_the_base_models_weights(shape):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(shape["model"]))
    total = sum(p.numel() for p in model.parameters())
    assert matching_rank({**shape, "into": "lora", "budget": "5%"}) == max(1, round(0.05 * total / (3 * 2 * 64)))


def test_modules_and_models_without_a_rank_are_refused(shape):
    with pytest.raises(ConfigError, match="not 'pfeiffer'"):
        matching_rank({**shape, "into": "pfeiffer", "budget": "1%"})
    with pytest.raises(ConfigError, match="no model folder"):
        matching_rank({**shape, "model": "./nowhere", "into": "lora", "budget": "1%"})
    with pytest.raises(ConfigError, match="cannot be added"):
        matching_rank({**shape, "lora_targets": ["nope"], "into": "lora", "budget": "1%"})
