"""A call of several processes failed: which of them did not take part, and what to look at."""

from __future__ import annotations

import threading
import time

import torch
import torch.distributed as dist

ROLL_CALL = 2.0  # seconds that a process which has lost the others waits for them to say the same


def lost(group: dist.ProcessGroup | None, doing: str, error: BaseException) -> str:
    """What to tell the user of a process whose call failed.

    Args:
        group: The process group; None for all processes.
        doing: What the processes did together.
        error: What ``torch.distributed`` raised.
    """
    said = (str(error).splitlines() or [type(error).__name__])[0]
    said = said if len(said) <= 200 else f"{said[:197]}..."
    if not dist.is_initialized():
        return f"the process group is gone in {doing}: it must live as long as the selection trains. torch says: {said}"
    ranks = list(range(dist.get_world_size(group)))
    mine = dist.get_rank(group)
    silent = _silent(group, mine, ranks)
    if silent is None and len(ranks) == 2:
        silent = [1 - mine]
    if silent:
        who = f"process {', '.join(map(str, silent))} did not take part: it has ended or died, hangs, or does something else"
    else:
        who = "another process did not take part in time" if silent is None else "all have lost each other"
    return (
        f"process {mine} of {len(ranks)} has lost the others in {doing}: {who}. Look at the output of each process: the earliest "
        "error is the cause. A process that dies is noticed at once, one that hangs when the process group's timeout is "
        f"over{_timeout(group)}. Go on from the last checkpoint, with any number of processes. torch says: {said}"
    )


def _silent(group: dist.ProcessGroup | None, mine: int, ranks: list[int]) -> list[int] | None:
    """Those that do not say within `ROLL_CALL` seconds that they have lost the others too; None: the store is gone."""
    found: list[list[int]] = []

    def call() -> None:
        try:
            store = dist.distributed_c10d._get_default_store()
            members = [rank if group is None else dist.get_global_rank(group, rank) for rank in ranks]
            store.set(f"unmask/lost/{members[mine]}", "1")
            end = time.monotonic() + (ROLL_CALL if len(ranks) > 2 else 0.0)  # of two it is the other
            while True:
                silent = [r for r in ranks if r != mine and not store.check([f"unmask/lost/{members[r]}"])]
                if not silent or time.monotonic() >= end:
                    found.append(silent)
                    return
                time.sleep(0.05)
        except (RuntimeError, ValueError, AttributeError):  # the process that holds the store has died
            return

    thread = threading.Thread(target=call, daemon=True)  # a store whose host is gone may block
    thread.start()
    thread.join(ROLL_CALL + 1.0)
    return found[0] if found else None


def _timeout(group: dist.ProcessGroup | None) -> str:
    """The group's timeout, where torch tells it."""
    try:
        device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        seconds = (group or dist.group.WORLD)._get_backend(device).options._timeout.total_seconds()  # type: ignore[union-attr]
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return " (init_process_group(timeout=...))"
    return f" ({seconds:.0f} s here; init_process_group(timeout=...) sets it)"
