"""Tensors trained whole: their gradients' mean over the processes, at the end of every backward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.dense import DenseTensor
from unmask.distributed.processes import Processes
from unmask.distributed.reducer import ProcessReducer
from unmask.distributed.rounds import BUCKET


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
