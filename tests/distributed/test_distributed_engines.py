"""Tests several processes under torchrun, accelerate and transformers' Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import engine_runs as runs
import processes
import pytest
import torch

from unmask import SparseDelta
from unmask.selection.state import read_state


def assert_same_selection(left: Path, right: Path) -> None:
    a, b = (SparseDelta.load(folder / "delta.safetensors") for folder in (left, right))
    assert a.sparse.keys() == b.sparse.keys()
    assert a.whole.keys() == b.whole.keys()
    for name, entry in a.sparse.items():
        assert entry.indices.equal(b.sparse[name].indices), name
        torch.testing.assert_close(entry.values, b.sparse[name].values)
    for name, tensor in a.whole.items():
        torch.testing.assert_close(tensor, b.whole[name])


@pytest.fixture
def folders(tmp_path):
    """Returns a function that makes folders by name."""

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    return folder


def run(count: int, folder: Path, function, *args, **options):
    return processes.run(count, folder / "processes", function, str(folder), *args, group=False, **options)


def test_a_run_whose_process_died_goes_on_with_another_number_of_processes(folders):
    """Runs the page's script in one process, and in two of which one dies at step 4; then four processes go on."""
    code = runs.snippet(0).replace('exchange="candidates"', 'exchange="exact"')
    death = "    if step == 4 and rank == 1: os._exit(1)\n"
    dying = code.replace("    optimizer.step()\n", "    optimizer.step()\n" + death)
    assert death in dying
    run(1, folders("one"), runs.script, code)
    run(2, folders("dead"), runs.script, dying, dies=True)
    assert not (folders("dead") / "delta.safetensors").exists()
    assert 4 <= torch.load(folders("dead") / "checkpoint.pt")["selection"]["step"] <= 5
    processes.run(4, folders("four"), runs.script, str(folders("dead")), code, group=False)
    assert_same_selection(folders("one"), folders("dead"))


@pytest.mark.slow
def test_the_pages_script_runs_under_torchrun(tmp_path):
    (tmp_path / "run.py").write_text(runs.snippet(0))
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(SparseDelta.load(tmp_path / "delta.safetensors")) == 40


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_pages_accelerate_lines_make_the_run_of_one_process(accumulation, folders):
    run(1, folders("one"), runs.accelerated, accumulation)
    run(2, folders("two"), runs.accelerated, accumulation)
    assert_same_selection(folders("one"), folders("two"))


def test_the_trainer_selects_as_one_process_and_goes_on_after_a_death(folders):
    run(1, folders("one"), runs.trainer)
    run(2, folders("two"), runs.trainer, True)
    assert_same_selection(folders("one"), folders("two"))
    run(2, folders("dead"), runs.trainer, False, True, dies=True)
    assert read_state(folders("dead") / "out" / "checkpoint-4" / "selection.safetensors")["step"] == 4
    processes.run(4, folders("four"), runs.trainer, str(folders("dead")), False, False, True, group=False)
    assert_same_selection(folders("one"), folders("dead"))


@pytest.mark.parametrize("head", [False, True])
def test_a_peft_model_in_an_ordinary_trainer_makes_the_run_of_one_process(head, folders):
    """One process also continues from a checkpoint of two."""
    run(1, folders("one"), runs.config_alone, head)
    run(2, folders("two"), runs.config_alone, head)
    assert_same_selection(folders("one"), folders("two"))
    (folders("two") / "delta.safetensors").unlink()
    processes.run(1, folders("again"), runs.config_alone, str(folders("two")), head, True, group=False)
    assert_same_selection(folders("one"), folders("two"))


def test_arguments_that_shard_the_model_after_the_selection_are_refused(folders):
    for said in run(2, folders("two"), runs.refused):
        assert "Leave them out: under torchrun the selection reduces its own gradients" in said
