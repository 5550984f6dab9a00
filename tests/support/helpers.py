"""Holds tiny models, dense gradients by autograd, and selection by a plain sort, which several test files need."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import unmask
from unmask import Selection

ROOT = Path(__file__).parents[2]  # the checkout


def mlp(width: int = 6, depth: int = 3, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers).to(dtype)


def batches(count: int, size: int = 4, width: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, width, generator=generator).to(dtype) for _ in range(count)]


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Tensor],
    loss: Callable[[nn.Module, Tensor], Tensor] = mean_square,
) -> None:
    for x in data:
        loss(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()


def dense_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Returns every parameter's gradient by ordinary autograd, on an ordinary copy."""
    twin = copy.deepcopy(model).requires_grad_(True)
    twin.zero_grad()
    loss(twin).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for name, p in twin.named_parameters()}


def gradient_at_slots(selection: Selection, gradients: dict[str, Tensor]) -> Tensor:
    """Returns the entries of dense gradients at the slots, in slot order."""
    names, bounds = selection.ledger.layout.names, selection.ledger.layout.bounds
    flat = torch.cat([gradients[name].reshape(-1) for name in names])
    assert flat.numel() == bounds[-1]
    tentative, positions = selection.ledger.tentative, selection.ledger.positions.clone()
    if tentative is not None:
        positions[tentative.slots] = tentative.positions
    return torch.where(positions >= 0, flat[positions], torch.zeros(()).to(flat)).to(selection.values.dtype)


def d3_scores(model: nn.Module, gradients: dict[str, Tensor], exp: float = 2.0) -> dict[str, Tensor]:
    return {
        name: gradients[name].abs().float() / (p.detach().abs().float() + 1.0) ** exp
        for name, p in model.named_parameters()
    }


def first_k(
    scores: dict[str, Tensor], k: int, held: dict[str, Tensor] | None = None, above: float = -math.inf
) -> dict[str, list[int]]:
    """The k first entries of a score above a floor, by a plain Python sort: score descending, then name, then flat index."""
    entries = []
    for name in sorted(scores):
        taken = set() if held is None or name not in held else set(held[name].tolist())
        flat = scores[name].reshape(-1).tolist()
        entries += [(-score, name, i) for i, score in enumerate(flat) if i not in taken and score > above]
    chosen: dict[str, list[int]] = {}
    for _, name, i in sorted(entries)[:k]:
        chosen.setdefault(name, []).append(i)
    return {name: sorted(indices) for name, indices in chosen.items()}


def as_lists(indices: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: flat.tolist() for name, flat in indices.items()}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Compares bitwise: -0.0 is not 0.0."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert (
            left[name]
            .contiguous()
            .view(-1)
            .view(torch.uint8)
            .equal(right[name].contiguous().view(-1).view(torch.uint8))
        ), name


def assert_unselected_is_base(model: nn.Module, base: dict[str, Tensor], selection: Selection) -> None:
    """Asserts that every weight outside the selection is bitwise the base's."""
    own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}  # a tied tensor has one name
    restored = {name: tensor for name, tensor in snapshot(model).items() if name in own}
    base = {name: tensor for name, tensor in base.items() if name in own}
    for name, flat in selection.indices.items():
        tensor = restored[name].reshape(-1).clone()
        tensor[flat] = base[name].reshape(-1)[flat]
        restored[name] = tensor.view(base[name].shape)
    assert_same_tensors(restored, base)


def id3_run(
    model: nn.Module, budget: int = 12, steps: int = 4, lr: float = 0.05
) -> tuple[Selection, torch.optim.Optimizer]:
    selection = unmask.select(model, unmask.id3(budget=budget, steps=steps))
    return selection, torch.optim.AdamW(selection.parameters(), lr=lr)


class Travelling(nn.Module):
    """The model with a body, running statistics, a tied output, a column-major tensor, a scalar and a new head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.body = mlp(depth=2)
        self.norm = nn.BatchNorm1d(6)
        self.turned = nn.Parameter(torch.randn(6, 6).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        ids = x[:, :3].abs().mul(3).long().clamp(max=8)
        x = self.norm(self.body(x + self.embed(ids).mean(1)) @ self.turned * self.scale)
        return self.head(self.out(x))


def travelling(dtype: torch.dtype = torch.float32, seed: int = 0) -> Travelling:
    torch.manual_seed(seed)
    return Travelling().to(dtype)


def trained(
    dtype: torch.dtype = torch.float32, method: unmask.Method | None = None, **patterns: str
) -> tuple[nn.Module, nn.Module, Selection]:
    """Returns (base, tuned, selection)."""
    base, tuned = travelling(dtype), travelling(dtype)
    selection = unmask.select(tuned, method or unmask.id3(60, steps=3), **patterns)
    train(tuned, torch.optim.AdamW(selection.parameters(), lr=0.1), batches(4, dtype=dtype))
    return base, tuned, selection
