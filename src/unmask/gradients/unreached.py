"""A forward that uses no tensor whose gradient is wanted: its backward gives the slots a gradient of zero.

All slots may lie in a branch that a batch does not use. No output would then require grad, and ``backward`` would fail with
torch's own error (of several processes, the others would wait). So the model's output hangs on a signal, which a backward
brings to the taps as it does a gradient. A forward that uses such a tensor is left as it is.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from unmask.gradients.taps import TapSet


def watch_forwards(model: nn.Module, taps: TapSet) -> None:
    """Gives a selection's model its hooks, until `unwatch_forwards`."""
    unwatch_forwards(model)  # a copy has those of its original
    hook = _Hook(taps)
    model.register_forward_pre_hook(hook)
    model.register_forward_hook(hook)


def unwatch_forwards(model: nn.Module) -> None:
    """Takes the hooks off a model, or off a copy of it."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
            del hooks[key]


class _Hook:
    """Runs before and after a model's forward. In copies and pickles of the model it does nothing; a pickle needs no unmask.

    Args:
        taps: The selection's taps; None in a copy.
    """

    def __init__(self, taps: TapSet | None) -> None:
        self._taps = (lambda: None) if taps is None else weakref.ref(taps)
        self._served = 0  # by the taps, when the forward began
        self._anchor = torch.zeros((), requires_grad=True)  # never receives a gradient

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, and returns None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler must not see a tap's state
    def __call__(self, model: nn.Module, args: Any, *output: Any) -> Any:
        taps = self._taps()
        if taps is None or not torch.is_grad_enabled():
            return None
        if not output:
            self._served = taps.served
            return None
        return self._joined(taps, output[0]) if taps.serves and taps.served == self._served else None

    def _joined(self, taps: TapSet, output: Any) -> Any:
        floats = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        trained = any(leaf.requires_grad for leaf in floats)  # dense tensors: what does not hang on them stays as it is
        signal = _Signal.apply(self._anchor, taps)

        def join(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.requires_grad != trained:
                return leaf
            return _Join.apply(leaf, signal)

        return tree_map(join, output)


class _Signal(torch.autograd.Function):
    """Zero; its backward tells the taps of a backward that brings them no gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, taps: TapSet) -> Tensor:  # type: ignore[override]
        ctx.taps = taps
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.taps.signal()
        return None, None


class _Join(torch.autograd.Function):
    """A tensor as it is, with a signal that its backward sets off."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, signal: Tensor) -> Tensor:  # type: ignore[override]
        return tensor.clone()  # a view must not be written to in place, as a Trainer does with a loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, torch.zeros(())
