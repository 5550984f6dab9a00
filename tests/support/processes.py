"""Runs a function in several processes, as torchrun does, and collects the results."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")  # the slow imports run once, in a process without threads
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch._dynamo",
        "transformers.models.bert.modeling_bert",
        "unmask.integrations.trainer",
    ]
)


def run(
    count: int, folder: Path, function: Callable[..., Any], *args: Any, group: bool = True, dies: bool = False
) -> list[Any]:
    """Returns ``[function(*args) in process 0, ... 1, ...]``; fails with the traceback of the first process that has one.

    Args:
        count: The number of processes.
        folder: The folder for their results and errors.
        function: A function of a module, so that it can be pickled.
        *args: The function's arguments.
        group: True makes the process group; False leaves that to the function, by the environment that torchrun sets.
        dies: True expects the processes to fail.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = (count, str(folder), port, group, function, args)
    workers = [_CONTEXT.Process(target=_work, args=(rank, *context), daemon=True) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200.0)
    hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
    assert not hung, f"processes {hung} hang"
    failures = [path.read_text() for path in sorted(folder.glob("*.error"))]
    if dies:
        assert any(worker.exitcode for worker in workers)
        return failures
    assert not failures, "\n".join(failures)
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(count)]


def _work(
    rank: int, count: int, folder: str, port: int, group: bool, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    try:
        if group:
            dist.init_process_group("gloo")
        torch.save(function(*args), f"{folder}/{rank}.result")
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
