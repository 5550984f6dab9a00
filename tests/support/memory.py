"""Measures the most memory that torch holds at once, by its profiler, in a frozen backward and in a selecting step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import unmask


class Layers(nn.Module):
    """Has equal layers. Their activations are kept for a backward even if all weights are frozen."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def peak(run: Callable[[], object]) -> int:
    """Returns the most bytes that torch's allocator gives out at once on the CPU while ``run`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def peaks(method: unmask.Method, depth: int, width: int, tokens: int) -> tuple[int, int, int]:
    """Returns the peak of a frozen backward, that of two selecting steps, and the bytes of the largest gradient."""
    x = torch.randn(tokens, width)

    def frozen() -> None:
        Layers(depth, width).requires_grad_(False)(x.clone().requires_grad_()).square().sum().backward()

    def selecting() -> None:
        model = Layers(depth, width)
        optimizer = torch.optim.SGD(unmask.select(model, method).parameters(), lr=1e-3)
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return peak(frozen), peak(selecting), width * width * 4
