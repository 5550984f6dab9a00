"""Tests sweeps on a local Ray of two CPUs: results, retries and resumption are those of local workers."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_runs
from rich.console import Console

from unmask.errors import ConfigError
from unmask.lab.study import Store, expand, parse, run_sweep
from unmask.lab.study.engine import Order

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not tested here.


def sweep(lrs=("1e-4", "1e-3", "1e-2")):
    return parse(
        {
            "name": "fake",
            "settings": {"model": "m", "task": "rte", "budget": "1%"},
            "methods": {"id3": {"grid": {"lr": list(lrs)}}},
        }
    )


def run(folder, function, engine="ray", **more):
    return run_sweep(
        sweep(), Store(folder), function=f"sweep_runs:{function}", engine=engine, console=Console(quiet=True), **more
    )


def times(folder, run_id, what="starts"):
    return sweep_runs.times(Store(folder).output_path(run_id), what)


def wait_for(condition, seconds=30.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def cluster():
    """Starts a Ray of two CPUs. It is given a token, so that Ray writes none to the user's home."""
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    paths = os.pathsep.join(path for path in sys.path if path)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()
    del os.environ["RAY_AUTH_TOKEN"]


def test_ray_gives_the_same_ids_and_results_as_local_workers(cluster, tmp_path):
    ours, theirs = (run(tmp_path / name, "threads", name, workers=2, threads=1).results for name in ("local", "ray"))
    assert sorted(ours) == sorted(theirs) == sorted(cell.id for cell in expand(sweep()))
    for run_id, result in ours.items():
        assert {**result, "started": "", "seconds": 0} | {"CUDA_VISIBLE_DEVICES": ""} == (
            {**theirs[run_id], "started": "", "seconds": 0} | {"CUDA_VISIBLE_DEVICES": ""}
        )
    assert {result["OMP_NUM_THREADS"] for result in theirs.values()} == {"1"}


def test_a_killed_worker_is_retried_once_and_an_error_not_at_all(cluster, tmp_path):
    report = run(tmp_path / "dying", "dying", workers=2)
    (failed,) = report.failed
    assert (failed["labels"]["lr"], failed["error"]["type"]) == ("1e-2", "WorkerDied")
    attempts = {result["labels"]["lr"]: times(tmp_path / "dying", i) for i, result in report.results.items()}
    assert attempts == {"1e-4": 2, "1e-3": 1, "1e-2": 2}
    (failed,) = run(tmp_path / "failing", "failing", workers=2).failed
    assert (failed["error"]["type"], times(tmp_path / "failing", failed["id"])) == ("ValueError", 1)
    assert run(tmp_path / "failing", "failing", workers=2, retry_failed=True).failed == []
    assert times(tmp_path / "failing", failed["id"]) == 2


def test_closing_with_patience_lets_a_run_save_and_go_on_later(cluster, tmp_path):
    from unmask.lab.study.cluster import RayEngine
    from unmask.lab.study.scheduler import plan

    store, cell = Store(tmp_path), expand(sweep())[0]
    store.write_plan(plan(sweep(), [cell]))
    engine = RayEngine(store, "sweep_runs:stepping", workers=1, threads=1)
    engine.submit(Order(cell))
    wait_for(lambda: times(tmp_path, cell.id, "steps") >= 3)
    engine.close(patience=20.0)
    assert (store.result(cell.id), 3 <= times(tmp_path, cell.id, "steps") < 20) == (None, True)
    engine.submit(Order(cell))
    (outcome,) = engine.wait(20.0)
    assert (outcome.status, store.result(cell.id)["steps"]) == ("done", 20)
    engine.close()
    assert ray.is_initialized()  # The engine did not start this Ray, so it leaves it running.


def test_settings_that_cannot_work_on_the_cluster_are_refused(cluster, tmp_path):
    with pytest.raises(ConfigError, match="threads = 3; the largest node of the Ray cluster has 2 CPUs"):
        run(tmp_path, "quick", threads=3)
    with pytest.raises(ConfigError, match="devices = 0; Ray assigns GPUs itself"):
        run(tmp_path, "quick", devices=("0",))
    with pytest.raises(ConfigError, match="engine = 'dask'; it must be local or ray"):
        run(tmp_path, "quick", engine="dask")
    with pytest.raises(ConfigError, match="a worker cannot make runs: function = 'sweep_runs:no_such'"):
        run(tmp_path, "no_such")


COMMAND = """
import sys
import test_cluster as t
t.run(sys.argv[1], "stepping", workers=2, threads=1)
"""


def test_the_runs_of_a_killed_sweep_end_and_the_next_sweep_goes_on_where_they_were(cluster, tmp_path):
    paths = os.pathsep.join(path for path in sys.path if path)
    driver = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: any(path.read_text().count("\n") >= 3 for path in tmp_path.glob("runs/*/steps")))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    pids = {int(pid) for path in tmp_path.glob("runs/*/steps") for pid in path.read_text().split()}
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))  # Ray ends the workers of a dead driver.
    report = run(tmp_path, "stepping", workers=2, threads=1)
    assert [result["status"] for result in report.results.values()] == ["done"] * 3
    assert {times(tmp_path, run_id, "steps") for run_id in report.results} == {20}
