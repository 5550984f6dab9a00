"""Lets a backward run, with gradients of zero, after a forward that uses no tensor whose gradient is wanted."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from unmask.gradients.taps import TapSet


def watch_forwards(model: nn.Module, taps: TapSet) -> None:
    """Adds a *signal* to the model's outputs where a forward uses no wanted tensor, until `unwatch_forwards`.

    All slots may lie in a branch of the model that a batch does not use. No output would then require grad, and ``backward``
    would fail; with several processes, the others would wait. The signal is a zero whose backward tells the taps that one runs.
    """
    unwatch_forwards(model)  # A copied model has the hooks of its original.
    hook = _Hook(taps)
    model.register_forward_pre_hook(hook)
    model.register_forward_hook(hook)


def unwatch_forwards(model: nn.Module) -> None:
    """Takes the hooks off a model, or off a copy of it."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
            del hooks[key]


class _Hook:
    """The hook before and after a model's forward; before it, the tensors get what was written to ``values``.

    Copies and pickles of it do nothing; to load a pickle needs no unmask.
    """

    def __init__(self, taps: TapSet | None) -> None:
        self._taps = (lambda: None) if taps is None else weakref.ref(taps)
        self._anchor = torch.zeros((), requires_grad=True)  # It makes the signal require grad, and never receives one.

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # A callable that takes anything, and returns None.

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # A compiler must not see the state of taps.
    def __call__(self, model: nn.Module, args: Any, *output: Any) -> Any:
        taps = self._taps()
        if taps is None or taps.paused:
            return None
        if not output:  # This is the hook before the forward.
            taps.served, taps.running = False, True
            taps.catch_up()
            return None
        taps.running = False
        if not torch.is_grad_enabled() or taps.served:
            return None
        floats = [leaf for leaf in tree_leaves(output[0]) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        # With tensors that are trained whole, the outputs that do not depend on them stay as they are.
        trained = any(leaf.requires_grad for leaf in floats)
        signal = _Signal.apply(self._anchor, taps)

        def join(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.requires_grad != trained:
                return leaf
            return _Join.apply(leaf, signal)

        return tree_map(join, output[0])


class _Signal(torch.autograd.Function):
    """Zero; the backward tells the taps that a backward runs that brings them no gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, taps: TapSet) -> Tensor:  # type: ignore[override]
        ctx.taps = taps
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.taps.signal()
        return None, None


class _Join(torch.autograd.Function):
    """The identity on a tensor; the backward also runs that of the signal."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, signal: Tensor) -> Tensor:  # type: ignore[override]
        return tensor.clone()  # Not a view, which must not be written to in place, as a Trainer does with a loss.

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, torch.zeros(())
