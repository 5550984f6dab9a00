"""Records the operations that torch dispatches, in order."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.lab.bench.host import waits


class Sequence(TorchDispatchMode):
    """Records the operations with the shapes of their tensors, and those that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen, self.waiting = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(a.shape) for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor)]
        self.seen.append((str(func), shapes))
        if waits(func, args):
            self.waiting.append(str(func))
        return func(*args, **(kwargs or {}))
