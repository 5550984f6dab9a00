"""Times a list of rows on one model: decides which are in memory together, then lets each group run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from unmask.lab.bench.builders import missing
from unmask.lab.bench.grouping import plan_groups, row_bytes, step_bytes, too_large
from unmask.lab.bench.heap import keep_freed_memory
from unmask.lab.bench.lanes import Lane, LocalLane, RemoteLane
from unmask.lab.bench.machine import available_bytes
from unmask.lab.bench.models import Blueprint
from unmask.lab.bench.rounds import RowResult, race
from unmask.lab.bench.rows import ADAPTED, Row
from unmask.lab.bench.settings import BenchSettings

_LIBRARIES = 400 << 20  # what a process weighs before it has a model
Say = Callable[[str], None]
Save = Callable[[], None]


def estimates(results: Sequence[RowResult], plan: Blueprint, processes: bool = False) -> tuple[dict[str, int], int]:
    """Bytes that each row holds, and what a step needs beside; estimates, see `unmask.lab.bench.grouping`.

    Args:
        results: The rows.
        plan: The model.
        processes: Each row has a process of its own, whose heap may keep what a step needed: nothing is left beside.
    """
    described = plan.describe()
    itemsize = 2 if plan.dtype == torch.bfloat16 else 4
    weights = described["parameters"] * itemsize
    held = {result.row.label: row_bytes(result.row, weights) for result in results}
    if not processes:
        return held, step_bytes(described, weights, plan.config, itemsize)
    for result in results:
        adapted = result.row.kind in ADAPTED
        held[result.row.label] += _LIBRARIES + step_bytes(described, weights, plan.config, itemsize, adapted)
    return held, 0


def refuse_missing(results: Sequence[RowResult]) -> None:
    """Marks rows whose package is not installed."""
    for result in results:
        reason = missing(result.row)
        if reason:
            result.status, result.reason = "not installed", reason


def time_rows(
    results: Sequence[RowResult],
    plan: Blueprint,
    settings: BenchSettings,
    say: Say,
    save: Save,
    processes: bool = False,
) -> dict[str, Any]:
    """Runs every row that waits, in groups that fit into memory.

    Args:
        results: Filled in place.
        plan: The model.
        settings: The run.
        say: Takes a line of progress, one per round.
        save: Called after every round, so that a killed run leaves what it has.
        processes: Each row in a process of its own, or all of a group in this one.

    Returns:
        How the rows were grouped, as JSON values.
    """
    waiting = [result for result in results if result.status == "waiting"]
    held, step = estimates(waiting, plan, processes)
    start, heap = (_process_of(settings), {}) if processes else _lane_in(plan, settings)
    free = available_bytes(plan.device)
    by_label = {result.row.label: result for result in waiting}
    groups = plan_groups(held, step, free, settings.isolate, settings.memory_share)
    for number, labels in enumerate(groups):
        members = [by_label[label] for label in labels]
        large = too_large(labels, held, step, available_bytes(plan.device))
        if large:
            _skip(members, large)
            continue
        say(f"group {number + 1} of {len(groups)}: {', '.join(labels)}")
        after_round = _reporter(settings, say, save)
        for draw in range(settings.draws):
            race(members, start, settings, number, after_round, draw)
            _free()
    save()
    return {
        "groups": groups,
        "interleaved": len(groups) == 1,
        "free_bytes": free,
        "held_bytes": held,
        "step_bytes": step,
        "heap": heap,
        "processes": processes,
        "note": "ratios of rows of different groups go through the frozen row" if len(groups) > 1 else None,
    }


def _process_of(settings: BenchSettings) -> Callable[[Row], Lane]:
    return lambda row: RemoteLane(row, settings)


def _lane_in(plan: Blueprint, settings: BenchSettings) -> tuple[Callable[[Row], Lane], dict[str, str]]:
    """Rows of this process, on the same batches; on the CPU its heap keeps what it has."""
    heap, batches = keep_freed_memory() if plan.device.type == "cpu" else {}, plan.batches()
    return lambda row: LocalLane(row, plan, batches, settings), heap


def _skip(members: Sequence[RowResult], reason: str) -> None:
    for result in members:
        if not result.steps:
            result.status, result.reason = "skipped", reason


def _reporter(settings: BenchSettings, say: Say, save: Save) -> Callable[[], None]:
    start, each = time.perf_counter(), settings.warmup + settings.rounds
    count, done = each * settings.draws, 0

    def after_round() -> None:
        nonlocal done
        save()
        elapsed = time.perf_counter() - start
        kind = "warm-up" if done % each < settings.warmup else "timed"
        done += 1
        say(f"  round {done} of {count} ({kind}): {elapsed:.0f} s, about {elapsed / done * (count - done):.0f} s to go")

    return after_round


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
