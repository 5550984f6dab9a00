"""Tests sweeps of made-up runs in real worker processes: each run is made once, and goes on after a kill."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_runs
from rich.console import Console

from unmask.errors import ConfigError, DataError, UnmaskError
from unmask.lab.study import Store, expand, parse, run_sweep
from unmask.lab.study.scheduler import SweepInterruptedError

HERE = Path(__file__).parent


def sweep(lrs=("1e-4", "1e-3", "1e-2"), seeds=(0,), **more):
    return parse(
        {
            "name": "fake",
            "settings": {"model": "m", "task": "rte", "budget": "1%"},
            "axes": {"seed": list(seeds)},
            "methods": {"id3": {"grid": {"lr": list(lrs)}}},
            **more,
        }
    )


def run(plan, folder, function, **more):
    return run_sweep(plan, Store(folder), function=f"sweep_runs:{function}", console=Console(quiet=True), **more)


def times(folder, run_id, what="starts"):
    return sweep_runs.times(Store(folder).output_path(run_id), what)


def test_every_run_is_done_once_and_skipped_afterwards(tmp_path):
    plan = sweep(seeds=(0, 1))
    report = run(plan, tmp_path, "quick", workers=2)
    ids = [cell.id for cell in expand(plan)]
    assert sorted(report.results) == sorted(ids)
    assert len(set(ids)) == 6
    assert run(plan, tmp_path, "quick").results == report.results
    assert [times(tmp_path, i) for i in ids] == [1] * 6
    result = json.loads(Store(tmp_path).result_path(ids[0]).read_text())
    assert result["settings"] == {"model": "m", "task": "rte", "method": "id3", "budget": "1%", "lr": 1e-4}
    assert (result["status"], result["loss"], result["labels"]["lr"]) == ("done", 0.7, "1e-4")
    assert "printed by the run 0" in Store(tmp_path).log_path(ids[0]).read_text()


def test_more_seeds_make_only_the_new_runs(tmp_path):
    run(sweep(), tmp_path, "quick")
    report = run(sweep(seeds=(0, 1)), tmp_path, "quick")
    assert len(report.results) == 6
    assert {times(tmp_path, i) for i in report.results} == {1}


def test_a_failed_run_is_recorded_and_made_again_only_when_asked(tmp_path):
    report = run(sweep(), tmp_path, "failing")
    (failed,) = report.failed
    assert failed["error"]["type"] == "ValueError"
    assert failed["error"]["message"] == "the loss is <NaN> [/b]"
    assert "sweep_runs.py" in failed["error"]["traceback"]
    assert len(report.results) == 3
    assert len(run(sweep(), tmp_path, "failing").failed) == 1
    assert times(tmp_path, failed["id"]) == 1
    assert run(sweep(), tmp_path, "failing", retry_failed=True).failed == []
    assert times(tmp_path, failed["id"]) == 2


def test_a_run_whose_worker_is_killed_is_tried_once_more(tmp_path):
    report = run(sweep(), tmp_path, "dying", workers=2)
    (failed,) = report.failed
    assert (failed["labels"]["lr"], failed["error"]["type"]) == ("1e-2", "WorkerDied")
    assert "SIGKILL" in failed["error"]["message"]
    attempts = {result["labels"]["lr"]: times(tmp_path, i) for i, result in report.results.items()}
    assert attempts == {"1e-4": 2, "1e-3": 1, "1e-2": 2}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_running_sweep_shows_its_runs_and_their_counts(tmp_path, terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120, color_system=None)
    plan = sweep(methods={"odd [bold]": {"grid": {"lr": ["1e-3", "1e-2"]}}})
    run_sweep(plan, Store(tmp_path), function="sweep_runs:failing", console=console)
    text = shown.getvalue()
    assert "odd [bold], seed 0, lr 1e-3" in text
    assert "accuracy 0.5000, loss 0.5000" in text
    assert "failed: the loss is <NaN> [/b]" in text
    assert "2 ended, 0 to go, 1 failed" in text


def test_threads_and_devices_reach_the_workers(tmp_path):
    report = run(sweep(), tmp_path, "threads", workers=2, threads=3, devices=("5",))
    assert {(r["OMP_NUM_THREADS"], r["CUDA_VISIBLE_DEVICES"]) for r in report.results.values()} == {("3", "5")}


def test_the_other_seeds_run_at_the_chosen_rate_alone(tmp_path):
    plan = sweep(seeds=(0, 1, 2), choose={"seeds": [0]})
    report = run(plan, tmp_path, "quick", workers=2)
    assert sorted((r["labels"]["seed"], r["labels"]["lr"]) for r in report.results.values()) == [
        (0, "1e-2"), (0, "1e-3"), (0, "1e-4"), (1, "1e-3"), (2, "1e-3"),
    ]  # fmt: skip


def test_a_function_that_cannot_be_imported_and_a_count_of_no_workers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no_such"):
        run(sweep(), tmp_path, "no_such")
    with pytest.raises(ConfigError, match="workers = 0"):
        run(sweep(), tmp_path, "quick", workers=0)


def test_a_damaged_result_is_refused(tmp_path):
    report = run(sweep(), tmp_path, "quick")
    path = Store(tmp_path).result_path(next(iter(report.results)))
    path.write_text('{"status": "do')
    with pytest.raises(DataError, match="remove the file"):
        run(sweep(), tmp_path, "quick")


COMMAND = """
import sys
from unmask.lab.study import Store, parse, run_sweep
import test_scheduler as t
t.run(t.sweep(seeds=(0, 1)), sys.argv[1], "stepping", workers=int(sys.argv[2]))
"""


def start(folder, workers):
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(folder), str(workers)],
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # A job in the background ignores SIGINT.
    )


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true in time"
        time.sleep(0.01)


def steps_files(folder):
    return [path for path in Path(folder).glob("runs/*/steps") if path.read_text().count("\n") >= 3]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_sweep_that_is_killed_at_any_point_goes_on_where_it_was(tmp_path):
    """The whole sweep is killed several times. In the end every step of every run has been done exactly once."""
    for ended in range(3):
        parent = start(tmp_path, 2)
        wait_for(
            lambda ended=ended: len(list(tmp_path.glob("results/*"))) >= ended and len(steps_files(tmp_path)) > ended
        )
        pids = {int(pid) for path in steps_files(tmp_path) for pid in path.read_text().split()}
        parent.kill()
        parent.communicate()
        wait_for(lambda pids=pids: not any(alive(pid) for pid in pids))  # The workers end with their parent.
    report = run(sweep(seeds=(0, 1)), tmp_path, "stepping", workers=2)
    assert not list(tmp_path.glob("results/.*"))
    assert [r["status"] for r in report.results.values()] == ["done"] * 6
    assert {result["steps"] for result in report.results.values()} == {20}
    assert {times(tmp_path, i, "steps") for i in report.results} == {20}


def test_the_part_file_of_a_process_that_was_killed_while_writing_is_removed(tmp_path):
    run_id = expand(sweep())[0].id
    part = Store(tmp_path).result_path(run_id).with_name(f".{run_id}.jsonabc.part")
    part.parent.mkdir()
    part.write_text("{")
    report = run(sweep(), tmp_path, "quick")
    assert report.results[run_id]["status"] == "done"
    assert sorted(path.stem for path in part.parent.iterdir()) == sorted(report.results)


def test_two_sweeps_over_one_folder_share_the_work(tmp_path):
    other = start(tmp_path, 1)
    wait_for(lambda: steps_files(tmp_path))
    report = run(sweep(seeds=(0, 1)), tmp_path, "stepping", workers=1)
    _, errors = other.communicate(timeout=30)
    assert (other.returncode, errors) == (0, b"")
    assert len(report.results) == 6
    assert {times(tmp_path, i, "steps") for i in report.results} == {20}
    pids = {path.read_text().split()[0] for path in tmp_path.glob("runs/*/steps")}
    assert len(pids) == 2  # Both commands have made some of the runs.


def test_an_interrupted_sweep_lets_its_runs_save_and_says_how_to_go_on(tmp_path):
    parent = start(tmp_path, 2)
    wait_for(lambda: len(steps_files(tmp_path)) == 2)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=30)
    assert b"The same command goes on" in errors
    assert parent.returncode == 1
    assert len(list(tmp_path.glob("results/*"))) <= 2
    assert run(sweep(seeds=(0, 1)), tmp_path, "stepping", workers=2).failed == []


def test_the_error_of_an_interrupted_sweep_is_caught_with_the_others():
    assert issubclass(SweepInterruptedError, UnmaskError)
    assert sweep_runs.scored({})["loss"] == 0.5


def test_a_lock_is_freed_when_its_process_is_killed(tmp_path):
    code = (
        "import sys, time; from unmask.lab.study import Store\n"
        "with Store(sys.argv[1]).lock('a') as mine:\n    print(mine, flush=True); time.sleep(60)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}
    )
    assert holder.stdout.readline() == b"True\n"
    with Store(tmp_path).lock("a") as mine:
        assert not mine
    with Store(tmp_path).lock("b") as mine:
        assert mine
    holder.kill()
    holder.communicate()
    with Store(tmp_path).lock("a") as mine:
        assert mine
