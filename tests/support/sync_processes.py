"""Holds the functions that the processes of the tests of unmask.sync run: process 0 trains, the others follow."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import nets
import torch
import torch.distributed as dist
from distributed_runs import blocks, fsdp_batch, part, place, shard
from helpers import snapshot
from torch import Tensor

import unmask
from unmask import SyncError, SyncTimeoutError
from unmask.sync import Distributed, InProcess, Publisher, Receiver

METHODS: dict[str, Callable[[], unmask.Method]] = {
    "id3": lambda: unmask.id3(60, steps=3),
    "repeat_d3": lambda: unmask.repeat_d3(60),
    "pafi": lambda: unmask.pafi(60),
}
STEPS = 5


class Trainer:
    """A model in training, of a base that all processes make."""

    def __init__(self, method: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        self.model = nets.mixed(dtype)
        self.selection = unmask.select(self.model, METHODS[method](), **options)
        self.optimizer = torch.optim.AdamW(self.selection.parameters(), lr=1e-2)
        self.steps = 0

    def train(self) -> dict[str, Tensor]:
        """Trains a step, and returns the model's tensors after it."""
        nets.loss(self.model, nets.tokens(self.steps)).backward()
        self.optimizer.step()
        self.steps += 1
        return snapshot(self.model)


def follow(method: str) -> list[tuple[int, dict[str, Tensor]]]:
    """Returns the versions, and the tensors at each. The last process makes a new receiver before the fourth message."""
    rank, count = place()
    if rank == 0:
        trainer = Trainer(method, exchange="none")
        publisher = Publisher(trainer.selection, Distributed())
        found = []
        for _ in range(STEPS):
            tensors = trainer.train()
            found.append((publisher.publish(), tensors))
        kinds = [sent.kind for sent, _ in found]
        assert [number for number, kind in enumerate(kinds) if kind == "full"] == [0, 3]
        return [(sent.version, tensors) for sent, tensors in found]
    held = []
    receiver = Receiver(nets.mixed(torch.bfloat16), Distributed())
    for version in range(1, STEPS + 1):
        if rank == count - 1 and version == 4:
            receiver = Receiver(nets.mixed(torch.bfloat16), Distributed())
        held.append((receiver.receive(timeout=60), snapshot(receiver._targets._model)))
    return held


def follow_all() -> dict[str, list[tuple[int, dict[str, Tensor]]]]:
    return {method: follow(method) for method in METHODS}


def in_a_group() -> list[dict[str, Tensor]]:
    """Two processes train together, and the last two of three are the group in which messages go: process 1 publishes."""
    rank, _ = place()
    training, sync = dist.new_group([0, 1]), dist.new_group([1, 2])
    found = []
    if rank < 2:
        trainer = Trainer("id3", group=training)
        publisher = Publisher(trainer.selection, Distributed(sync, src=1)) if rank == 1 else None
        for _ in range(STEPS):
            found.append(trainer.train())
            if publisher is not None:
                publisher.publish()
        return found
    receiver = Receiver(nets.mixed(torch.bfloat16), Distributed(sync, src=1))
    for _ in range(STEPS):
        receiver.receive()
        found.append(snapshot(receiver._targets._model))
    return found


def misuse() -> list[str]:
    """Returns the texts of errors."""
    rank, _ = place()
    said = []
    alone = dist.new_group([0])

    def note(function: Callable[[], Any]) -> None:
        try:
            function()
        except SyncError as error:
            said.append(str(error))

    if rank == 1:
        note(lambda: Publisher(unmask.select(nets.mixed(), unmask.pafi(6), exchange="none"), Distributed()))
        note(lambda: Distributed(src=7))
    else:
        note(lambda: Receiver(nets.mixed(), Distributed()))
        note(lambda: Distributed(alone, src=1))
    return said


def late() -> str:
    """The trainer sends its second message too late."""
    rank, _ = place()
    if rank == 0:
        trainer = Trainer("pafi", exchange="none")
        publisher = Publisher(trainer.selection, Distributed())
        publisher.publish()
        time.sleep(8)
        os._exit(1)
    receiver = Receiver(nets.mixed(torch.bfloat16), Distributed())
    receiver.receive()
    before = snapshot(receiver._targets._model)
    try:
        receiver.receive(timeout=1.0)
    except SyncTimeoutError as error:
        same = all(
            torch.equal(a, b) for a, b in zip(before.values(), snapshot(receiver._targets._model).values(), strict=True)
        )
        return f"{same} {receiver.version} {error}"
    return "nothing was raised"


def lost() -> str:
    """The trainer ends after its first message."""
    rank, _ = place()
    if rank == 0:
        publisher = Publisher(Trainer("pafi", exchange="none").selection, Distributed())
        publisher.publish()
        os._exit(1)
    receiver = Receiver(nets.mixed(torch.bfloat16), Distributed())
    receiver.receive()
    try:
        receiver.receive()
    except SyncError as error:
        return f"{receiver.version} {error}"
    return "nothing was raised"


def sharded(method: str) -> bool:
    """Returns True if the copy that follows a model sharded by FSDP2 holds its full tensors after each step."""
    model, rollout = shard(blocks()), blocks()
    selection = unmask.select(model, METHODS[method]())
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    transport = InProcess()
    publisher, receiver = Publisher(selection, transport), Receiver(rollout, transport)
    same = True
    for step in range(STEPS):
        nets.loss(model, part(fsdp_batch(step))).backward()
        optimizer.step()
        if place()[0] == 0:  # no other process need take part
            publisher.publish()
            receiver.receive(timeout=0)
        full = {name: p.full_tensor() for name, p in model.named_parameters()}
        if place()[0] == 0:
            held = dict(rollout.named_parameters())
            same = same and all(torch.equal(held[name], full[name]) for name in full)
            same = same and any(not torch.equal(held[name], p) for name, p in blocks().named_parameters())
    try:
        Publisher(unmask.select(shard(blocks()), unmask.pafi(9), new="head"), transport)
    except SyncError as error:
        return same and "'head.bias' is in no base" in str(error)
    return False


def sharded_all() -> dict[str, bool]:
    return {method: sharded(method) for method in METHODS}
