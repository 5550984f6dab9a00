"""Tensors trained whole, outside the budget: a new head, say. Half-precision ones get a float32 master copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


class DenseTensor:
    """One tensor that is trained whole.

    Attributes:
        name: The parameter's name.
        parameter: The model's own parameter.
        master: What the optimizer holds: the parameter itself, or its float32 master if it is bfloat16 or float16.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.owner: object = None  # kept alive by the hook below, whoever else forgets it
        parameter.requires_grad_(True)
        self.master = parameter
        self._hook = None
        self.version = -1  # the parameter's, after our own last write; see unmask.identity
        if parameter.dtype in _HALF:
            self.master = nn.Parameter(parameter.detach().float())
            self._hook = parameter.register_post_accumulate_grad_hook(self._hand_over)
            self.version = parameter._version

    def sync(self) -> None:
        """After an optimizer step: rounds the master into the model's tensor; its gradient is spent."""
        if self.master is not self.parameter:
            self.write()
            self.master.grad = None  # the model's zero_grad() would not reach it

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the master into the model's tensor."""
        self.parameter.copy_(self.master)
        self.version = self.parameter._version

    def holds_master(self) -> bool:
        """Whether the model's tensor is the master, rounded."""
        return torch.equal(self.parameter.detach(), self.master.detach().to(self.parameter))

    def load(self, values: Tensor) -> None:
        """Sets the tensor (and its master) to saved master values."""
        with torch.no_grad():
            self.master.copy_(values)
        self.sync()

    def release(self) -> None:
        """Removes the hook; the parameter keeps its trained values."""
        if self._hook is not None:
            self._hook.remove()
        self.owner = None

    def _hand_over(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if self.master.grad is None:
            self.master.grad = gradient.to(self.master)
        else:
            self.master.grad += gradient.to(self.master.device)
