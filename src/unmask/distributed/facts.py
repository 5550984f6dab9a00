"""What processes that train together must have in common: the method, a saved state, the optimizer, as plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from unmask.distributed.processes import bits, checksum
from unmask.methods.method import Method

POINTS = 64  # of a schedule


def facts_of_method(method: Method, budget: int) -> dict[str, Any]:
    """A method, and its schedule as numbers: a function's name says little, and a lambda's nothing.

    Example:
        >>> import unmask
        >>> method = unmask.id3(8, steps=4).but(schedule=unmask.Schedule.of(lambda t, T, B: t, 4))
        >>> {key: value for key, value in facts_of_method(method, 8).items() if key.startswith("b(")}
        {'b(0)': 0, 'b(1)': 1, 'b(2)': 2, 'b(3)': 8}
    """
    steps = method.schedule.steps
    points = sorted({i * (steps - 1) // max(1, min(steps, POINTS) - 1) for i in range(min(steps, POINTS))})
    return method.describe() | {f"b({t})": method.cumulative(t, budget) for t in points}


def facts_of_state(state: Any) -> dict[str, Any]:
    """What a selection's state holds, as digests; buffers may differ between processes (BatchNorm's)."""
    if not isinstance(state, Mapping):
        return {"the state": type(state).__name__}
    facts: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and key != "buffers":
            facts |= {f"{key} {name}": _fact(part) for name, part in value.items()}
        elif key != "buffers":
            facts[f"the saved {key}"] = _fact(value)
    return facts


def _fact(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    data = value.detach().cpu().contiguous().view(-1)
    digest = hashlib.blake2b(bits(data).numpy().tobytes(), digest_size=8).hexdigest()
    return f"{value.numel():,} numbers with the digest {digest}"


def settings_of(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's class and the settings of its groups, as far as they are plain values; the learning rate is one.

    Example:
        >>> import torch
        >>> settings = settings_of(torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.5))
        >>> settings["optimizer"], settings["lr"], settings["momentum"]
        ('SGD', 0.5, 0)
    """
    several = len(optimizer.param_groups) > 1
    settings: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for number, group in enumerate(optimizer.param_groups):
        of = f" of group {number}" if several else ""
        settings[f"parameters{of}"] = len(group["params"])
        plain = {key: value.item() if _single(value) else value for key, value in group.items() if key != "params"}
        settings |= {f"{key}{of}": value for key, value in plain.items() if _is_plain(value)}
    return settings


def state_of_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """What an optimizer has gathered, by parameter: checksums of tensors, and plain values."""
    facts: dict[str, Any] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                value = value.item() if _single(value) else f"a tensor with checksum {checksum(value.detach()).item()}"
            if _is_plain(value):
                facts[f"the optimizer's {key} of parameter {number}"] = value
    return facts


def _single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) <= 8 and all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))
