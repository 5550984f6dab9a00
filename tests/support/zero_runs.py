"""Holds the functions that the processes of `test_zero_gradients.py` run; each also runs in one process."""

from __future__ import annotations

import nets
import torch
from distributed_runs import METHODS, part, place
from torch import Tensor

import unmask


def silent_steps(method: str, exchange: str) -> tuple[list[int], Tensor, Tensor]:
    """Returns (weights unmasked after each step, positions, values); step 0 has no gradient, step 1 a partial one."""
    model = nets.mixed()
    selection = unmask.select(model, METHODS[method](), exchange=exchange)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    used = []
    for step in range(4):
        batch = nets.tokens(step)
        rank, count = place()
        if count == 1 and step == 1:
            value = nets.loss(model, batch[4:]) / 2
        else:
            value = nets.loss(model, part(batch)) * (0.0 if step == 0 or (step == 1 and rank == 0) else 1.0)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        used.append(selection.used)
    return used, selection.ledger.positions.clone(), selection.values.detach().clone()


def grid(cases: list[tuple[str, str]]) -> list[tuple[list[int], Tensor, Tensor]]:
    return [silent_steps(*case) for case in cases]


class Halves(torch.nn.Module):
    """Has two layers side by side; a batch reaches one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, which: str) -> Tensor:
        return getattr(self, which)(x).square().mean()


def one_reaches_nothing() -> Tensor:
    """Returns the left layer after steps in which the second process's batches use the frozen layer alone."""
    model = Halves()
    selection = unmask.select(model, unmask.id3(8, steps=2), include="left")
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    rank, count = place()
    for step in range(4):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        (model(x, "left" if rank == 0 else "right") * (1 if count == 2 else 0.5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.left.weight.detach().clone()
