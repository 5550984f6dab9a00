"""Trains tensors whole, outside the budget (a new head, say). Half-precision ones get a float32 master copy."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unmask.distributed.ranking import BUCKET
from unmask.distributed.reducer import ProcessReducer
from unmask.gradients.writes import Writes

_HALF = (torch.bfloat16, torch.float16)


class DenseTensor:
    """One tensor that is trained whole.

    Attributes:
        name: The parameter's name.
        parameter: The model's own parameter.
        master: The optimizer's parameter: the model's own, or a float32 copy if that is bfloat16 or float16.
        owner: The selection, which the hook below keeps alive even if the user drops it.
        version: The parameter's version counter after our own last write (see `unmask.selection.identity`).
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.owner: object = None
        parameter.requires_grad_(True)
        self.master = parameter
        self._hook = None
        self._writes: Writes | None = None
        self.version = -1
        if parameter.dtype in _HALF:
            self.master = nn.Parameter(parameter.detach().float())
            self._writes = Writes(self.master)
            self._hook = parameter.register_post_accumulate_grad_hook(self._hand_over)
            self.version = parameter._version

    def sync(self) -> None:
        """Rounds the master into the model's tensor after an optimizer step, and drops the spent gradient."""
        if self._writes is not None:
            self.write()
            self.master.grad = None  # the model's zero_grad() would not reach it

    def catch_up(self) -> None:
        """Rounds the master into the model's tensor, if it was written to since."""
        if self._writes is not None and self._writes.new:
            self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the master into the model's tensor."""
        self.parameter.copy_(self.master)
        self.version = self.parameter._version
        if self._writes is not None:
            self._writes.take()

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
        """Moves the gradient of the model's tensor to the master."""
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if self.master.grad is None:
            self.master.grad = gradient.to(self.master)
        else:
            self.master.grad += gradient.to(self.master.device)


class _BeforeForward:
    """The forward pre-hook that brings writes into masters to a module's tensors. A copy of it does nothing.

    A compiler leaves out the hooks of all modules but the root, the model: each would break its graph.
    """

    def __init__(self, tensors: Sequence[DenseTensor] = (), root: bool = True) -> None:
        self._tensors, self._root = list(tensors), root

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._root or not torch.compiler.is_compiling():
            self._catch_up()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler must not see version counters
    def _catch_up(self) -> None:
        for tensor in self._tensors:
            tensor.catch_up()

    def __reduce__(self) -> Any:
        return _BeforeForward, ()


def catch_up_before_forward(model: nn.Module, tensors: Sequence[DenseTensor]) -> list[RemovableHandle]:
    """Puts hooks on the model and on each module on the way to a dense tensor: a forward finds the masters' current values.

    Returns:
        The hooks' handles: ``remove()`` them when the selection ends.
    """
    rounded = {id(tensor.parameter): tensor for tensor in tensors if tensor.master is not tensor.parameter}
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
    """Averages the gradients of dense tensors over the processes, with or without DDP around the model.

    DDP averages the gradients of the parameters that it finds trainable, but not those of a half-precision tensor's float32
    master. Averaging values that already agree changes nothing. So all dense gradients are averaged once at the very end of a
    backward, even if DDP, or an earlier micro-batch, has averaged some of them before.
    """

    def __init__(self, tensors: Sequence[DenseTensor], reducer: ProcessReducer) -> None:
        self._tensors, self._reducer = list(tensors), reducer
        self._task: weakref.ref[functools.partial[None]] | None = (
            None  # of the average that a running backward will make
        )
        self._hooks = [t.parameter.register_post_accumulate_grad_hook(self._arrived) for t in tensors]

    def remove(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, parameter: Tensor) -> None:
        """Has the average made at the end of the backward that has brought a first dense gradient."""
        self._reducer.join()
        if self._reducer.processes is not None and (self._task is None or self._task() is None):
            average = functools.partial(self.reduce)  # autograd alone holds it, and drops it if the backward fails
            self._task = weakref.ref(average)
            # A callback that queues another one: this runs after all that the backward has queued, DDP's among them.
            _at_the_end(functools.partial(_at_the_end, average))

    @torch.no_grad()
    def reduce(self) -> None:
        """Averages all gradients; the backward is complete."""
        self._task, processes = None, self._reducer.processes
        assert processes is not None, "only several processes have anything to reduce"
        self._reducer.meet_for_dense()
        masters = [t.master for t in self._tensors]
        reached = torch.tensor([m.grad is not None for m in masters], dtype=torch.uint8, device=masters[0].device)
        buckets: list[list[Tensor]] = [[]]
        for master, anywhere in zip(masters, processes.sum(reached).tolist(), strict=True):
            if not anywhere:
                continue
            if master.grad is None:  # the loss of another process has reached it
                master.grad = torch.zeros_like(master)
            elif master.grad.is_sparse:
                master.grad = master.grad.to_dense()
            last = buckets[-1]
            if last and (sum(g.numel() for g in last) >= BUCKET or last[0].dtype != master.grad.dtype):
                buckets.append([])
            buckets[-1].append(master.grad)
        for bucket in filter(None, buckets):
            for gradient, mean in zip(bucket, processes.means(bucket), strict=True):
                gradient.copy_(mean)


def _at_the_end(callback: functools.partial[None]) -> None:
    """Queues a callback of the running backward."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]
