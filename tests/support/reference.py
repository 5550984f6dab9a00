"""The plain dense reference: float32 masters of every eligible weight, a boolean mask and AdamW, all of size N.

It uses no code of unmask: gradients come from ordinary autograd on ordinary parameters, the selection is a full sort, and
weights outside the mask are put back after every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DenseReference:
    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        score: Callable[[Tensor, Tensor], Tensor]
        | Tensor,  # a function of (weights, gradients), both (N,); or fixed scores
        cumulative: Callable[[int], int],
        budget: int,
        repeat: bool | int = False,
        kept: bool = False,  # for repeat: a weight that leaves stays as it is, without a gradient
        above: float = -torch.inf,  # this score and lower ones select nothing
        **adamw: float,
    ) -> None:
        parameters = dict(model.named_parameters())
        self.model, self.tensors = model, [parameters[n] for n in sorted(names)]
        for p in model.parameters():
            p.requires_grad_(False)
        for p in self.tensors:
            p.requires_grad_(True)
        self.score, self.cumulative, self.budget, self.repeat = score, cumulative, budget, int(repeat)
        self.kept, self.above = kept, above
        self.base = self._weights()
        self.master = nn.Parameter(self.base.clone())
        self.mask = torch.zeros_like(self.base, dtype=torch.bool)
        self.picked = self.mask  # the weights with a gradient: with `kept`, the last picks
        self.optimizer = torch.optim.AdamW([self.master], **adamw)
        self.t = 0

    def _weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).float() for p in self.tensors])

    def step(self, loss_of: Callable[[nn.Module], Tensor]) -> float:
        loss = loss_of(self.model)
        loss.backward()
        gradient = torch.cat(
            [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1).float() for p in self.tensors]
        )
        for p in self.tensors:
            p.grad = None
        self._select(gradient)
        self.master.grad = torch.where(self.picked, gradient, 0.0)
        self.optimizer.step()
        with torch.no_grad():
            self.master.copy_(torch.where(self.mask, self.master, self.base))
            start = 0
            for p in self.tensors:
                p.copy_(self.master[start : start + p.numel()].view_as(p))
                start += p.numel()
        self.t += 1
        return loss.item()

    def _select(self, gradient: Tensor) -> None:
        scores = self.score if isinstance(self.score, Tensor) else self.score(self._weights(), gradient)
        if self.repeat:
            if (self.t % self.repeat and self.mask.any()) or not (scores > self.above).any():
                return
            new = torch.zeros_like(self.mask)
            new[scores.argsort(descending=True, stable=True)[: self.budget]] = True
            new &= scores > self.above
            self._replace(new | self.mask if self.kept else new)
            self.picked = new
            return
        used = int(self.mask.sum())
        new = self.mask.clone()
        scores = scores.masked_fill(new, -torch.inf)
        best = scores.argsort(descending=True, stable=True)[: self.cumulative(self.t) - used]
        new[best[scores[best] > self.above]] = True
        self._replace(new)

    def _replace(self, new: Tensor) -> None:
        """Sets the weights that leave back to the base; those that enter get fresh optimizer state."""
        entering = new & ~self.mask
        with torch.no_grad():
            self.master[~new] = self.base[~new]
        for state in self.optimizer.state[self.master].values():
            if state.shape == self.mask.shape:
                state[entering] = 0
        self.mask = self.picked = new
