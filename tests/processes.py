"""Runs a function in several processes of a gloo group, and brings back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, in a process without threads
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "unmask.selection"])


def run(count: int, folder: Path, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> list[Any]:
    """``[function(*args) in process 0, ... 1, ...]``; fails with the first process's traceback that has one."""
    folder.mkdir(parents=True, exist_ok=True)
    workers = [
        _CONTEXT.Process(target=_work, args=(rank, count, str(folder), function, args), daemon=True)
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout)
    hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
    failures = [p.read_text() for p in sorted(folder.glob("*.error"))]
    assert not failures, failures[0]
    assert not hung, f"processes {hung} hang"
    return [
        torch.load(folder / f"{rank}.result", weights_only=False)
        for rank in range(count)
        if (folder / f"{rank}.result").exists()
    ]


def _work(rank: int, count: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
        torch.save(function(*args), f"{folder}/{rank}.result")
        dist.destroy_process_group()
    except Exception:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
