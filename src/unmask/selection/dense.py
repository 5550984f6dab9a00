"""Tensors trained whole, outside the budget: a new head, say. Half-precision ones get a float32 master copy."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unmask.distributed.processes import Processes
from unmask.distributed.ranking import BUCKET
from unmask.distributed.reducer import ProcessReducer
from unmask.gradients.writes import Writes

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
        self.version = -1  # the parameter's, after our own last write; see unmask.selection.identity
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


class DenseGradients:
    """Reduces the gradients of dense tensors, whether or not DDP wraps the model.

    DDP reduces what it finds trainable, but not a half-precision tensor's float32 master. The mean is linear, and of what is the
    same everywhere it is that again; so the mean of everything comes last, and what was reduced before (by DDP, or in an earlier
    micro-batch) does no harm.

    Args:
        tensors: The dense tensors, the same in all processes.
        reducer: Says whose mean it is.
    """

    def __init__(self, tensors: Sequence[DenseTensor], reducer: ProcessReducer) -> None:
        self._tensors, self._reducer = list(tensors), reducer
        self._task: weakref.ref[_Last] | None = None
        self._hooks = [t.parameter.register_post_accumulate_grad_hook(self._arrived) for t in tensors]

    def remove(self) -> None:
        """Ends it."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, parameter: Tensor) -> None:
        self._reducer.join()
        if self._reducer.processes is not None and (self._task is None or self._task() is None):
            callback = _Last(self)
            self._task = weakref.ref(callback)
            _at_the_end(callback)

    @torch.no_grad()
    def reduce(self) -> None:
        """The backward is complete."""
        self._task, processes = None, self._reducer.processes
        if processes is None:
            raise AssertionError("only several processes have anything to reduce")
        bucket: list[Tensor] = []
        for gradient in self._gradients(processes):
            if bucket and (sum(g.numel() for g in bucket) >= BUCKET or bucket[0].dtype != gradient.dtype):
                _mean(bucket, processes)
                bucket = []
            bucket.append(gradient)
        if bucket:
            _mean(bucket, processes)

    def _gradients(self, processes: Processes) -> list[Tensor]:
        """The gradients of the tensors that some process's loss has reached; zero where this one's has not."""
        self._reducer.meet_for_dense()
        masters = [t.master for t in self._tensors]
        reached = torch.tensor([m.grad is not None for m in masters], dtype=torch.uint8, device=masters[0].device)
        anywhere = processes.sum(reached).tolist()
        for master, seen in zip(masters, anywhere, strict=True):
            if seen and master.grad is None:
                master.grad = torch.zeros_like(master)
            elif seen and master.grad is not None and master.grad.is_sparse:
                master.grad = master.grad.to_dense()
        return [m.grad for m, seen in zip(masters, anywhere, strict=True) if seen and m.grad is not None]


def _mean(gradients: list[Tensor], processes: Processes) -> None:
    flat = processes.mean(torch.cat([g.reshape(-1) for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


class _Last:
    """Runs after the callbacks that a backward has queued, DDP's among them; dies with a backward that dies."""

    def __init__(self, dense: DenseGradients) -> None:
        self._dense = dense
        self._queued = False

    def __call__(self) -> None:
        if self._queued:
            self._dense.reduce()
        else:
            self._queued = True
            _at_the_end(self)


def _at_the_end(callback: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]
