"""A contender: one row's model and optimizer, and one timed training step of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from unmask.lab.bench.models import Batch
from unmask.lab.bench.rows import Row
from unmask.lab.bench.stats import StepTime
from unmask.selection.selection import Selection

RATE = 1e-4  # of every optimizer; a step costs the same at any rate


@dataclass
class Contender:
    """A row that can train.

    Attributes:
        row: What it is.
        model: The model, in training mode; its forward on a batch gives a ``loss``.
        optimizer: None for the frozen floor.
        trainable: Scalar weights that it trains (for ID3: its budget).
        save: Writes what a user keeps of a training run into a folder, and returns the bytes; None: nothing to keep.
        used: How many weights it has trained so far; None: ``trainable``.
        selection: For unmask's rows.
        facts: Whatever else is worth knowing, e.g. the rank that was chosen.
    """

    row: Row
    model: nn.Module
    optimizer: Optimizer | None
    trainable: int
    save: Callable[[Path], int] | None = None
    used: Callable[[], int] | None = None
    selection: Selection | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def selecting(self) -> bool:
        """Whether the next step unmasks anything."""
        if self.selection is None:
            return False
        t, method, budget = self.selection.step, self.selection.method, self.selection.budget
        return method.cumulative(t, budget) > method.cumulative(t - 1, budget)

    def trained(self) -> int:
        """How many weights it has trained so far."""
        return self.used() if self.used else self.trainable

    def step(self, batch: Batch, autocast: bool, group: int = 0, round_: int = 0) -> StepTime:
        """One training step, timed: forward (with the loss), backward, optimizer (``step`` and ``zero_grad``)."""
        device = batch["input_ids"].device
        selecting = self.selecting
        start = _now(device)
        with torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = self.model(**batch).loss
        forward = _now(device)
        loss.backward()
        backward = _now(device)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        end = _now(device) if self.optimizer is not None else backward
        return StepTime(group, round_, forward - start, backward - forward, end - backward, selecting)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def adamw(parameters: list[nn.Parameter], **options: Any) -> torch.optim.AdamW:
    """The optimizer of every row but the authors', with torch's defaults."""
    return torch.optim.AdamW(parameters, lr=RATE, **options)


def state_bytes(optimizer: Optimizer | None) -> int:
    """Bytes of an optimizer's tensors: its state, and masks that it keeps in its parameter groups."""
    if optimizer is None:
        return 0
    kept = [value for state in optimizer.state.values() for value in state.values()]
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params":
                kept.extend(value if isinstance(value, (list, tuple)) else [value])
    return sum(t.numel() * t.element_size() for t in kept if isinstance(t, torch.Tensor))
