"""Tests that processes end with an error that names the process and the cause if one differs, is out of step, dies or hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import agree_runs as runs
import processes
import pytest
import torch.distributed as dist
from commands import run as command
from tiny import tiny_world

from unmask import SparseDelta
from unmask.distributed.facts import difference, header

EXPECTED = {  # the text that the error of both processes must have
    "another_schedule": ["b(1) is 1 in process 1 and 2 in process 0"],
    "another_rank_count": ["budget is 13 in process 1 and 12 in process 0"],
    "another_model": ["4.weight is (6, 6) of torch.float32 in process 1 and not there in process 0"],
    "refused_in_one": ["budget = 1000000 asks for 1,000,000 weights"],
    "unreadable_in_one": ["the disk is gone"],
    "older_state": ["load_state_dict()", "the saved step is 2 in process 1 and 4 in process 0"],
    "other_values": [
        "load_state_dict()",
        "the saved values is 12 numbers with the digest",
        "load the file that one process",
    ],
    "damaged_state": ["the saved positions is not there in process 1"],
    "loaded_in_one": ["process 0 is in the backward of micro-batch 1 of step 0; process 1 is in load_state_dict()"],
    "another_rate": ["the first step of an optimizer", "lr is 0.02 in process 1 and 0.01 in process 0"],
    "another_optimizer": ["optimizer is Adamax in process 1 and AdamW in process 0"],
    "other_betas": ["betas is [0.9, 0.95] in process 1 and [0.9, 0.999] in process 0"],
    "optimizer_state_in_one": ["the optimizer's step of parameter 0 is not there in process 1 and 2.0 in process 0"],
    "one_more_micro_batch": [
        "micro-batch 1 of step 3; process 1 is in the backward of micro-batch 3 of step 2",
        "drop_last",
    ],
    "one_more_at_the_first_step": ["process 0 is in the first step", "process 1 is in the backward of micro-batch 3"],
    "a_step_skipped": ["process 0 is in the backward of micro-batch 1 of step 3", "micro-batch 1 of step 2"],
    "a_batch_dropped": ["process 0 is in the backward of micro-batch 2 of step 2", "micro-batch 1 of step 2"],
    "a_rate_changed": ["micro-batch 1 of step 3: lr is 0.005 in process 1 and 0.01 in process 0"],
    "a_rate_changed_for_one_step": ["lr at the last step is 0.005 in process 1 and 0.01 in process 0"],
    "values_written": ["process 1 differs from process 0 in the backward of micro-batch 1 of step 3: `values`"],
    "moments_changed": ["process 1 differs from process 0 in the backward of micro-batch 1 of step 4: `values`"],
    "a_head_by_another_rate": ["`values` or a tensor trained whole is another there"],
    "full_by_one_more_batch": ["process 1 is in the exchange of the tensors trained whole, step 2"],
}
# The error that the refusing process raises itself.
OWN = {"refused_in_one": "MethodError", "unreadable_in_one": "OSError"}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return processes.run(2, tmp_path_factory.mktemp("scenarios"), runs.scenarios)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in runs.BEFORE + runs.LATER])
def test_what_differs_is_refused_by_all_with_process_and_cause_and_all_can_go_on(scenario, told):
    for rank, results in enumerate(told):
        kind, text = results[scenario]
        assert kind == ("ProcessesDifferError" if rank == 0 else OWN.get(scenario, "ProcessesDifferError")), text
        for part in EXPECTED[scenario]:
            assert part in text
    if scenario not in OWN:
        assert told[0][scenario] == told[1][scenario]
    assert "process 1" in told[0][scenario][1]


def test_what_is_the_same_in_all_is_no_difference(tmp_path):
    """Tries a rate schedule, other numbers of micro-batches, a second optimizer and a resume; what all refuse keeps its error."""
    for *trained, refused in processes.run(2, tmp_path, runs.undisturbed):
        assert trained == [("nothing", "")] * 3
        assert refused[0] == "MethodError"


def test_a_process_that_dies_is_named_by_all_others(tmp_path):
    processes.run(3, tmp_path / "processes", runs.dies, str(tmp_path), dies=True)
    for rank in range(2):
        kind, text = (tmp_path / f"{rank}.told").read_text().split("\n")
        assert kind == "ProcessesDifferError"
        assert text.startswith(
            f"process {rank} of 3 has lost the others in the backward of micro-batch 1 of step 2: process 2 "
        )
        assert "Look at the output of each process" in text


def test_a_process_that_hangs_is_named_when_the_timeout_is_over(tmp_path):
    first, second = processes.run(2, tmp_path / "processes", runs.hangs, str(tmp_path))
    assert first[0] == second[0] == "ProcessesDifferError"
    assert "process 1 did not take part" in first[1]
    assert "all have lost each other" in second[1]  # this process comes too late
    assert "(2 s here; init_process_group(timeout=...) sets it)" in first[1]
    assert 1.5 < first[2] < 30.0


def test_each_process_is_named_that_differs_from_the_others():
    texts = [header("step 3", {"lr": rate, "eps": 1})[0] for rate in (0.2, 0.1, 0.1)]
    assert difference(texts, [0, 0, 0], "Mend it.").startswith(
        "process 0 differs from process 1 in step 3: lr is 0.2 in process 0 and 0.1 in process 1. Mend it."
    )
    alike = [header("step 3", {})[0]] * 4
    assert "processes 1, 2 differ from process 0 in step 3: `values`" in difference(alike, [5, 6, 7, 5], "")


# unmask train under torchrun


def words(output: str, *more: object) -> list[object]:
    data = ["--model", "base", "--data", "train.csv", "--eval", "dev.csv", "--text", "review", "--label", "verdict"]
    rest = ["--method", "id3", "--budget", 60, "--lr", 0.05, "--epochs", 1, "--set", "logging_steps=2"]
    return ["train", *data, *rest, "--output", output, *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tiny_world(tmp_path_factory.mktemp("world"))
    config = root / "base" / "config.json"
    # With dropout, each process would draw other masks.
    settings = json.loads(config.read_text()) | {"attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(settings))
    return root


@pytest.fixture(scope="module")
def launched(world):
    """Returns a function that runs the command in two processes: (status, standard output, standard error) of each."""

    def launch(name: str, *more: object) -> list[tuple[int, str, str]]:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        arguments = [str(word) for word in words(name, *more)]
        return processes.run(
            2, world / "processes" / name, runs.command, str(world), store.port, arguments, group=False
        )

    return launch


def test_a_run_in_two_processes_is_that_of_one_and_the_first_alone_prints_and_writes(world, launched):
    """Each process takes half of a batch of twice the size, so that the epochs are those of one process."""
    first, second = launched("two", "--batch-size", 4)
    assert (first[0], second[0]) == (0, 0)
    assert first[1].count("before:") == first[1].count("after:") == first[1].count("delta:") == 1
    assert second[1:] == ("", "")
    command(*words("one", "--batch-size", 8), cwd=world)
    one, two = (SparseDelta.load(world / name / "delta.safetensors") for name in ("one", "two"))
    assert one.sparse.keys() == two.sparse.keys()
    for name, entry in one.sparse.items():
        assert entry.indices.equal(two.sparse[name].indices)
        assert (entry.values - two.sparse[name].values).abs().max() < 1e-5
    lines = [(world / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    rows = [[json.loads(line) for line in each] for each in lines]
    for a, b in zip(*rows, strict=True):
        assert (a["step"], a["used"]) == (b["step"], b["used"])
        assert a.get("loss", a.get("eval_loss", 0)) == pytest.approx(b.get("loss", b.get("eval_loss", 0)), rel=1e-4)
    files = [{p.name for p in (world / name).rglob("*") if p.suffix != ".pth"} for name in ("one", "two")]
    assert files[0] == files[1]
    assert len((world / "two" / "allocation.jsonl").read_text().splitlines()) == 2


def test_an_error_that_all_have_is_printed_once(world, launched):
    (world / "held").mkdir()
    (world / "held" / "delta.safetensors").touch()
    both = launched("held")
    assert [status for status, _, _ in both] == [1, 1]
    assert "".join(error for _, _, error in both).count("already holds a run") == 1
    assert not any(out for _, out, _ in both)
    own = launched("own", "--seed", "RANK")
    assert [status for status, _, _ in own] == [1, 1]
    said = "".join(error for _, _, error in own)
    assert said.count("'classifier.weight' is another in process 1 than in process 0") == 1


@pytest.mark.slow
def test_the_command_runs_under_torchrun(world):
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    start += ["--rdzv-endpoint", "localhost:0", "--log-dir", "logs", "--redirects", "3", "-m", "unmask"]
    line = [*start, *map(str, words("torchrun", "--batch-size", 4))]
    done = subprocess.run(line, cwd=world, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = {path.parts[-2]: path.read_text() for path in Path(world, "logs").rglob("stdout.log")}
    assert "delta:" in said["0"]
    assert said["1"] == ""
    assert len(SparseDelta.load(world / "torchrun" / "delta.safetensors")) >= 60
