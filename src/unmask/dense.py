"""Tensors trained whole, outside the budget: a new head, say. Half-precision ones get a float32 master copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unmask.writes import Writes

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
        self._writes: Writes | None = None
        self.version = -1  # the parameter's, after our own last write; see unmask.identity
        if parameter.dtype in _HALF:
            self.master = nn.Parameter(parameter.detach().float())
            self._writes = Writes(self.master)
            self._hook = parameter.register_post_accumulate_grad_hook(self._hand_over)
            self.version = parameter._version

    def sync(self) -> None:
        """After an optimizer step: rounds the master into the model's tensor; its gradient is spent."""
        if self._writes is not None:
            self.write()
            self.master.grad = None  # the model's zero_grad() would not reach it

    def catch_up(self) -> None:
        """Rounds the master into the model's tensor, if anything was written into it since."""
        if self._writes is not None and self._writes.new:
            self.write()

    @property
    def rounded(self) -> bool:
        """Whether the model holds the rounding of a master."""
        return self._writes is not None

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the master into the model's tensor."""
        self.parameter.copy_(self.master)
        self.version = self.parameter._version
        if self._writes is not None:
            self._writes.take()

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


class _BeforeForward:
    """The forward pre-hook that brings writes into masters to a module's tensors. A copy of it does nothing.

    Args:
        tensors: The dense tensors at or below the module that have masters.
        root: Whether the module is the model. A compiler leaves the hooks of the others out: each would break its graph.
    """

    def __init__(self, tensors: Sequence[DenseTensor] = (), root: bool = True) -> None:
        self._tensors, self._root = list(tensors), root

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._root or not torch.compiler.is_compiling():
            _catch_up(self._tensors)

    def __reduce__(self) -> Any:
        return _BeforeForward, ()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler must not see version counters
def _catch_up(tensors: Sequence[DenseTensor]) -> None:
    for tensor in tensors:
        tensor.catch_up()


def catch_up_before_forward(model: nn.Module, tensors: Sequence[DenseTensor]) -> list[RemovableHandle]:
    """Hooks by which every forward of the model, or of a module on the way to a dense tensor, finds its master's current values.

    Returns:
        Their handles: ``remove()`` them when the selection ends.
    """
    rounded = {id(tensor.parameter): tensor for tensor in tensors if tensor.rounded}
    below: dict[str, list[DenseTensor]] = {"": list(rounded.values())} if rounded else {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")[:-1]
        for depth in range(1, len(parts) + 1) if id(parameter) in rounded else ():
            below.setdefault(".".join(parts[:depth]), []).append(rounded[id(parameter)])
    return [
        model.get_submodule(name).register_forward_pre_hook(_BeforeForward(held, name == ""), prepend=True)
        for name, held in below.items()
    ]
