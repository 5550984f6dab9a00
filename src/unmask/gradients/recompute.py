"""Inputs that need not be saved: another node of the graph has saved what they are a cheap function of.

A linear layer behind an activation saves the activation's output, while the activation itself has saved its input: the same
size twice. A sampled layer keeps the activation's node instead and applies the function again in its backward, which runs
before the activation's own. The result is the same bits: the same function of the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Node = Any  # an autograd node; its saved tensors are attributes


def _product(node: Node) -> Tensor:
    return node._saved_self * node._saved_other


_AGAIN: dict[str, tuple[tuple[str, ...], Callable[[Node], Tensor]]] = {  # the saved tensors needed, and the function
    "GeluBackward0": (("_saved_self",), lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate)),
    "SiluBackward0": (("_saved_self",), lambda node: F.silu(node._saved_self)),
    "MulBackward0": (("_saved_self", "_saved_other"), _product),  # a gated activation
}


def origin(x: Tensor) -> Node | None:
    """The node that can make x again; None if x must be saved.

    Example:
        >>> x = torch.nn.functional.gelu(torch.randn(3, requires_grad=True))
        >>> torch.equal(again(origin(x)), x)
        True
        >>> origin(x + 1) is None
        True
    """
    node = x.grad_fn
    found = None if node is None or x.output_nr else _AGAIN.get(node.name())
    if node is None or found is None or _hooked():
        return None
    return node if all(isinstance(getattr(node, name, None), Tensor) for name in found[0]) else None


def again(node: Node) -> Tensor:
    """The node's output once more."""
    return _AGAIN[node.name()][1](node)


def _hooked() -> bool:
    """Whether saved tensors go through hooks (checkpointing, offloading), which may be asked for each only once."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
