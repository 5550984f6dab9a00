"""Makes a sweep's runs on a Ray cluster, or in a Ray of this machine alone (extra ``ray``)."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError, need
from unmask.lab.study.engine import THREAD_VARIABLES, Order, Outcome
from unmask.lab.study.store import Store
from unmask.lab.study.worker import load_function, make_run


class RayEngine:
    """Makes every run as one Ray task. Ray chooses the node and keeps its worker processes alive between runs.

    If ``ray.init`` has not been called, the engine calls it: it joins the cluster of ``RAY_ADDRESS`` or of this
    machine, or starts a Ray here. All nodes must see the sweep's folder and the working directory under the same
    paths, and must have unmask installed. Ray repeats no run itself (``max_retries=0``). It reserves the threads of
    each run; None shares out the cluster's CPUs. The GPUs are shared out to the workers, at most one to each.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: No node has so many CPUs.
    """

    def __init__(self, store: Store, function: str, workers: int, threads: int | None) -> None:
        self._ray: Any = need("ray", "ray")
        self._store, self._function, self._runs = store, function, dict[Any, str]()
        self._started = not self._ray.is_initialized()
        if self._started:
            self._ray.init(include_dashboard=False, log_to_driver=False)
        try:
            total = self._ray.cluster_resources()
            most = max((int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]), default=0)
            if threads is not None and threads > most:
                raise ConfigError(
                    f"threads = {threads}; the largest node of the Ray cluster has {most} CPUs. Give fewer."
                )
            cpus = threads or max(1, min(most, int(total.get("CPU", 1)) // workers))
            environment = dict.fromkeys(THREAD_VARIABLES, str(cpus))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            self._task = self._ray.remote(_make_run_on_node).options(
                num_cpus=cpus,
                num_gpus=min(1.0, int(total.get("GPU", 0) / workers * 1e4) / 1e4),  # Ray counts in ten-thousandths.
                max_retries=0,
                runtime_env={"env_vars": environment},
            )
        except BaseException:
            self.close()
            raise

    def submit(self, order: Order) -> None:
        """Queues a Ray task."""
        task = self._task.remote(str(Path.cwd()), str(self._store.folder), self._function, order)
        self._runs[task] = order.cell.id

    def wait(self, timeout: float) -> Sequence[Outcome]:
        """Returns the orders that have ended; see `unmask.lab.study.engine.Engine.wait`."""
        if not self._runs:
            time.sleep(timeout)
            return []
        ended, _ = self._ray.wait(list(self._runs), timeout=timeout)
        outcomes = []
        for task in ended:
            run = self._runs.pop(task)
            try:
                outcomes.append(self._ray.get(task))
            except ConfigError as error:  # Ray raises an error of the task as one that is of its class too.
                raise ConfigError(f"a worker cannot make runs: {error.cause}") from error  # type: ignore[attr-defined]
            except self._ray.exceptions.TaskCancelledError:
                outcomes.append(Outcome(run, "interrupted"))
            except self._ray.exceptions.RayError as error:
                outcomes.append(Outcome(run, "died", " ".join(str(error).split())[:300]))
        return outcomes

    def close(self, patience: float = 0.0) -> None:
        """Cancels the tasks under way, and ends Ray if the engine started it; see `Engine.close`."""
        tasks = list(self._runs)
        if patience and tasks:
            for task in tasks:
                self._ray.cancel(task)
            self._ray.wait(tasks, num_returns=len(tasks), timeout=patience)
        for task in tasks:
            self._ray.cancel(task, force=True)
        self._runs.clear()
        if self._started:
            self._ray.shutdown()


def _make_run_on_node(directory: str, folder: str, function: str, order: Order) -> Outcome:
    """Makes a run in a process on one of the cluster's nodes, which must see the sweep's folder."""
    with contextlib.suppress(OSError):
        os.chdir(directory)
    if os.getcwd() != directory or not Path(folder, "sweep.json").is_file():
        raise ConfigError(
            f"the node {platform.node()} does not see the folder {folder!r} from {directory!r}; put the sweep's folder "
            "and the working directory where every node sees them under the same path."
        )
    return make_run(Store(folder), order, load_function(function))
