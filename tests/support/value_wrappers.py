"""Wraps one parameter as users do: averages of weights, SAM, and a schedule-free optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class SAM:
    """Writes as the common implementation of Foret et al. 2021: through ``data`` and by assignment to it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.optimizer = parameter, torch.optim.SGD([parameter], lr=0.2, momentum=0.9)

    def step(self, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        p = self.parameter
        with torch.no_grad():
            old = p.data.clone()
            p.add_(p.grad * (0.5 / p.grad.norm()))
        self.optimizer.zero_grad()
        loss().backward()
        p.data = old
        self.optimizer.step()
        self.optimizer.zero_grad()


class Lookahead:
    """Moves the fast weights half-way back to the slow ones every third step (Zhang et al. 2019)."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.optimizer = parameter, torch.optim.AdamW([parameter], lr=0.1)
        self.slow, self.count = parameter.detach().clone(), 0

    def step(self, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1
        if self.count % 3 == 0:
            self.slow.add_(self.parameter.data - self.slow, alpha=0.5)
            self.parameter.data.copy_(self.slow)


class ScheduleFree(torch.optim.Optimizer):
    """Runs Defazio et al. 2024 by SGD: gradients are at y = (1 - beta) z + beta x; x is the average of the z."""

    def __init__(self, params: list[nn.Parameter], lr: float = 0.2, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": True, "k": 0})

    @torch.no_grad()
    def _switch(self, weight: Callable[[float], float], mode: bool) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if group["train_mode"] != mode and "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight(group["beta"]))
            group["train_mode"] = mode

    def eval(self) -> None:
        self._switch(lambda beta: 1 - 1 / beta, False)

    def train(self) -> None:
        self._switch(lambda beta: 1 - beta, True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            share, beta, lr = 1 / group["k"], group["beta"], group["lr"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share)
                p.add_(p.grad, alpha=lr * (beta * (1 - share) - 1))
                z.sub_(p.grad, alpha=lr)


class Free:
    def __init__(self, parameter: nn.Parameter) -> None:
        self.optimizer = ScheduleFree([parameter])

    def step(self, loss: Callable[[], Tensor]) -> None:
        self.optimizer.train()
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer.eval()


class Ema:
    """Works as diffusers' ``EMAModel``: the shadow is stepped, stored over, copied in, and restored after an evaluation."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.optimizer = parameter, torch.optim.AdamW([parameter], lr=0.1)
        self.shadow = parameter.clone().detach()

    def step(self, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.shadow.sub_(0.3 * (self.shadow - self.parameter.detach()))
        stored = self.parameter.detach().cpu().clone()
        torch._foreach_copy_([self.parameter.data], [self.shadow])
        self.evaluated = loss().detach()
        self.parameter.data.copy_(stored.data)


class Averaged:
    """Holds the parameter in an ``AveragedModel``, whose average is evaluated in the parameter's place."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.optimizer = parameter, torch.optim.AdamW([parameter], lr=0.1)
        self.holder = nn.ParameterList([parameter])
        self.average = torch.optim.swa_utils.AveragedModel(self.holder)

    def step(self, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.holder)
        with torch.no_grad():
            stored = self.parameter.clone()
            self.parameter.copy_(self.average.module[0])
            self.evaluated = loss().detach()
            self.parameter.copy_(stored)
