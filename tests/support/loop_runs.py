"""Holds the training loops that the tests of states and of resuming share: a small network, and every method on it."""

from __future__ import annotations

import torch
from helpers import batches, mlp
from torch import Tensor, nn

import unmask

Begun = tuple[nn.Module, unmask.Selection, torch.optim.Optimizer]


class Net(nn.Module):
    """The network with running statistics, which a state holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = mlp(), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def fisher_loss(model: Net, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"].to(model.head.weight.dtype)).float()[:, :3], batch["labels"])


LABELLED = [
    {"x": x, "labels": torch.randint(0, 3, (4,), generator=torch.Generator().manual_seed(1))} for x in batches(2)
]
PRESETS = {
    "id3": lambda: unmask.id3(17, steps=5),
    "id3_strided": lambda: unmask.id3(17, steps=5, stride=2, schedule="cosine"),
    "repeat_d3": lambda: unmask.repeat_d3(17),
    "repeat_d3_strided": lambda: unmask.repeat_d3(17, stride=2),
    "repeat_d3_kept": lambda: unmask.repeat_d3(17, stride=2, leaving="kept"),
    "static_d3": lambda: unmask.static_d3(17),
    "id3_column": lambda: unmask.id3(17, steps=5).but(allocation="column"),
    "pafi": lambda: unmask.pafi(17),
    "fish": lambda: unmask.fish(17, LABELLED, loss=fisher_loss),
    "bitfit": lambda: unmask.bitfit(),
    "random_mask": lambda: unmask.random_mask(17, seed=3),
    "random_increment": lambda: unmask.random_mask(17).but(
        strategy="increment", schedule=unmask.Schedule.of("uniform", 5)
    ),
    "random_repeat": lambda: unmask.random_mask(17).but(strategy="repeat"),
    "full": lambda: unmask.full(),
}


def begin_net(preset: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Begun:
    torch.manual_seed(seed)
    model, method = Net().to(dtype), PRESETS[preset]()
    selection = unmask.select(model, method, dense=None if method.whole else "head")
    return model, selection, torch.optim.AdamW(selection.parameters(), lr=0.05, weight_decay=0.1)
