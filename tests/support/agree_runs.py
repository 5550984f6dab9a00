"""Holds the functions that the processes of test_processes_agree.py run: one process differs in one thing."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import runpy
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_runs import place
from helpers import mlp
from torch import Tensor, nn

import unmask
from unmask import UnmaskError

STEPS = 6


def odd() -> bool:
    """Returns True if this is the process that differs."""
    return place()[0] == place()[1] - 1


def start(
    method: unmask.Method | None = None, rate: float = 1e-2, dense: str | None = None, **options: Any
) -> tuple[nn.Module, unmask.Selection, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = mlp(depth=3)
    selection = unmask.select(model, method or unmask.id3(12, steps=STEPS, stride=2), dense=dense, **options)
    return model, selection, torch.optim.AdamW(selection.parameters(), lr=rate)


def backward(model: nn.Module, step: int = 0) -> None:
    seed = 10 * step + place()[0]
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def saved(steps: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the states of a run of some steps, which are alike in all processes."""
    model, selection, optimizer = start()
    train(model, optimizer, steps)
    states = selection.state_dict(), optimizer.state_dict()
    selection.release()
    return states


# Differences before training.


def another_schedule() -> None:
    """Uses two lambdas, whose names say nothing."""
    curve = (lambda t, T, B: t) if odd() else (lambda t, T, B: min(B, 2 * t))
    start(unmask.id3(12, steps=STEPS).but(schedule=unmask.Schedule.of(curve, STEPS)))


def another_rank_count() -> None:
    start(unmask.id3(12 + odd(), steps=STEPS))


def another_model() -> None:
    torch.manual_seed(0)
    unmask.select(mlp(depth=2 + odd()), unmask.id3(12, steps=STEPS))


def refused_in_one() -> None:
    """Makes one process refuse by itself, before it has met the others."""
    start(unmask.id3(10**6 if odd() else 12, steps=STEPS))


def unreadable_in_one() -> None:
    """Makes the calibration of one process raise an error that is not ours."""

    def squares(model: nn.Module, batch: Tensor) -> Tensor:
        if odd():
            raise OSError("the disk is gone")
        return model(batch).square().mean()

    start(unmask.fish(10, [torch.ones(4, 6)], loss=squares))


def older_state() -> None:
    early, late = saved(2)[0], saved(4)[0]
    start()[1].load_state_dict(early if odd() else late)


def other_values() -> None:
    state = saved()[0]
    if odd():
        state["values"] = state["values"].clone()
        state["values"][1] += 1e-3
    start()[1].load_state_dict(state)


def damaged_state() -> None:
    state = saved()[0]
    if odd():
        del state["positions"]
    start()[1].load_state_dict(state)


def loaded_in_one() -> None:
    state, (model, selection, optimizer) = saved()[0], start()
    if odd():
        selection.load_state_dict(state)
    train(model, optimizer)


# Differences that are known at the first step.


def another_rate() -> None:
    model, _, optimizer = start(rate=2e-2 if odd() else 1e-2)
    train(model, optimizer)


def another_optimizer() -> None:
    model, selection, optimizer = start()
    if odd():
        optimizer = torch.optim.Adamax(selection.parameters(), lr=1e-2)
    train(model, optimizer)


def other_betas() -> None:
    model, selection, _ = start()
    train(model, torch.optim.AdamW(selection.parameters(), betas=(0.9, 0.95 if odd() else 0.999)))


def optimizer_state_in_one() -> None:
    (state, moments), (model, selection, optimizer) = saved(), start()
    selection.load_state_dict(state)
    if not odd():
        optimizer.load_state_dict(moments)
    train(model, optimizer)


# Differences that come later.


def one_more_micro_batch() -> None:
    model, _, optimizer = start()
    train(model, optimizer)
    for micro in range(2 + odd()):
        backward(model, micro)
    optimizer.step()
    backward(model)


def one_more_at_the_first_step() -> None:
    model, _, optimizer = start()
    for micro in range(2 + odd()):
        backward(model, micro)
    optimizer.step()


def a_step_skipped() -> None:
    model, _, optimizer = start()
    train(model, optimizer)
    for step in range(2):
        backward(model, step)
        if not (odd() and step == 0):
            optimizer.step()
        optimizer.zero_grad()


def a_batch_dropped() -> None:
    """Makes one process throw a micro-batch's gradient away."""
    model, _, optimizer = start()
    train(model, optimizer)
    backward(model)
    if odd():
        optimizer.zero_grad()
    backward(model)


def a_rate_changed() -> None:
    model, _, optimizer = start()
    train(model, optimizer, 3)
    if odd():
        optimizer.param_groups[0]["lr"] = 5e-3
    backward(model)


def a_rate_changed_for_one_step() -> None:
    model, _, optimizer = start()
    train(model, optimizer, 3)
    backward(model)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 5e-3 if odd() else rate
    optimizer.step()
    optimizer.param_groups[0]["lr"] = rate
    backward(model)


def values_written() -> None:
    model, selection, optimizer = start()
    train(model, optimizer, 3)
    with torch.no_grad(), selection.writing():  # without it, a write under a growing method is refused by itself
        selection.values[0] += 1e-3 * odd()
    backward(model)


def moments_changed() -> None:
    model, selection, optimizer = start()
    train(model, optimizer, 3)
    if odd():
        optimizer.state[selection.values]["exp_avg"].zero_()
    train(model, optimizer, 2)


def a_head_by_another_rate() -> None:
    """Changes only the head's optimizer, which the selection does not know."""
    model, selection, _ = start(dense=r"^4\.")
    values, *head = selection.parameters()
    optimizers = [torch.optim.SGD([values], lr=1e-2), torch.optim.SGD(head, lr=0.2 if odd() else 0.1)]
    for step in range(2 + len(head)):
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()


def full_by_one_more_batch() -> None:
    """Trains in full, without `values`, so that the processes exchange only the tensors trained whole."""
    model, _, optimizer = start(unmask.full())
    train(model, optimizer)
    for micro in range(1 + odd()):
        backward(model, micro)
    optimizer.step()
    backward(model)


BEFORE = [
    another_schedule,
    another_rank_count,
    another_model,
    refused_in_one,
    unreadable_in_one,
    older_state,
    other_values,
    damaged_state,
    loaded_in_one,
    another_rate,
    another_optimizer,
    other_betas,
    optimizer_state_in_one,
]
LATER = [
    one_more_micro_batch,
    one_more_at_the_first_step,
    a_step_skipped,
    a_batch_dropped,
    a_rate_changed,
    a_rate_changed_for_one_step,
    values_written,
    moments_changed,
    a_head_by_another_rate,
    full_by_one_more_batch,
]


def error_of(call: Callable[[], None]) -> tuple[str, str]:
    """Returns (the class, the text) of the error that a process raises."""
    try:
        call()
    except (UnmaskError, OSError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def scenarios() -> dict[str, tuple[str, str]]:
    """Returns what each scenario raises; in between, all processes train as if nothing had happened."""
    results = {}
    for scenario in BEFORE + LATER:
        results[scenario.__name__] = error_of(scenario)
        model, selection, optimizer = start()
        train(model, optimizer)
        assert selection.step == 2
    return results


def undisturbed() -> list[tuple[str, str]]:
    """Trains with settings that differ in form alone, which no process may refuse."""

    def scheduled() -> None:
        model, _, optimizer = start(dense=r"^4\.")
        rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=5)
        for step in range(5):
            for micro in range(1 + step % 2):
                backward(model, micro)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()

    def several_optimizers() -> None:
        model, selection, optimizer = start()
        train(model, optimizer)
        train(model, torch.optim.SGD(selection.parameters(), lr=0.1))

    def gone_on() -> None:
        (state, moments), (model, selection, optimizer) = saved(), start()
        selection.load_state_dict(state)
        optimizer.load_state_dict(moments)
        train(model, optimizer)
        selection.load_state_dict(selection.state_dict())
        train(model, optimizer)

    def refused_by_every_one() -> None:
        start(unmask.id3(10**6, steps=2))

    return [error_of(call) for call in (scheduled, several_optimizers, gone_on, refused_by_every_one)]


# A process that dies, or hangs.


def dies(folder: str) -> None:
    """Makes the last process die between two steps; the others write the error that they get."""
    model, _, optimizer = start()
    train(model, optimizer)
    if odd():
        os._exit(7)
    _write(folder, error_of(lambda: train(model, optimizer)))


def hangs(folder: str) -> tuple[str, str, float]:
    """Makes the last process wait for the others' error, which comes when the group's timeout is over."""
    model, _, optimizer = start()
    train(model, optimizer)
    # The short timeout begins here. A busy machine may take longer than that to connect the processes.
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))
    begin = time.monotonic()
    while odd() and not Path(folder, "0.told").exists() and time.monotonic() < begin + 60:
        time.sleep(0.02)
    text = error_of(lambda: train(model, optimizer))
    seconds = time.monotonic() - begin
    _write(folder, text)
    while len([*Path(folder).glob("*.told")]) < 2 and time.monotonic() < begin + 60:
        time.sleep(0.02)  # The store, by which the last process learns why, ends with the first process.
    return (*text, seconds)


def _write(folder: str, text: tuple[str, str]) -> None:
    path = Path(folder, f"{place()[0]}.told")
    path.with_suffix(".new").write_text("\n".join(text))
    path.with_suffix(".new").rename(path)


def command(folder: str, port: int, words: list[str]) -> tuple[int, str, str]:
    """Runs ``python -m unmask`` as torchrun starts it; RANK among the words stands for this process's rank."""
    rank = os.environ["RANK"]
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.chdir(folder)
    output, errors, status = io.StringIO(), io.StringIO(), 0
    sys.argv = ["unmask", *(rank if word == "RANK" else word for word in words)]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            runpy.run_module("unmask", run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, output.getvalue(), errors.getvalue()
