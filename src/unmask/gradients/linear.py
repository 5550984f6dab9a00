"""Runs linear layers so that their backward forms no dense weight gradient; the output and the input's gradient are torch's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.errors import SelectionError
from unmask.gradients.backend import backend_of
from unmask.gradients.choice import choose
from unmask.gradients.embedding import embedding
from unmask.gradients.entries import Entries, take, take_columns
from unmask.gradients.factors import Factors
from unmask.gradients.sampled import Product, sampled_product
from unmask.gradients.tapped import Handler, StandIn, TappedParameter, stand_in_of, substitute
from unmask.gradients.taps import ByPlaceholder

LEAST = 64  # The tokens below which none is left out.
SHARE = 0.85  # The share of the tokens that may be left, at most, for leaving the others out to pay.
_PROBE = 64  # The number of rows that are looked at first.
_FEW = 16  # The number of columns that are looked at first.


def handlers(dense: bool) -> dict[Any, Handler]:
    """Makes `TapSet.handlers`; ``dense`` lets autograd run a linear operation whose dense product is the cheapest."""
    linear = _LinearHandlers(dense)
    return {F.linear: linear.linear, torch.addmm: linear.addmm, F.embedding: embedding}


@dataclass(slots=True)
class _Setup:
    """The settings of a linear operation, which are not its tensors."""

    stand_in: StandIn | None  # The weight's stand-in; None if its gradient is not wanted.
    bias: StandIn | None  # The bias's, if it stands for entries.
    how: Product  # The product that gives the weight's entries, if the placeholder stands for some.
    transposed: bool  # True for a weight of shape (in, out), as in the Conv1D of transformers.
    origin: Node | None  # The node that can make the input again, which is then not saved; None otherwise.
    autocast: torch.dtype | None  # The dtype that autocast computes in; None if it does not convert this operation.


class _LinearHandlers:
    """The handlers of linear operations; they leave to autograd those whose dense gradient is wanted, or is the cheapest.

    They remember the last input that autocast converted: the layers of query, key and value have the same one.
    """

    def __init__(self, dense: bool) -> None:
        self._dense = dense
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        """Handles ``F.linear(input, weight, bias)``."""
        return self._apply(input, weight, bias, transposed=False)

    def addmm(self, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, **options: Any) -> Any:
        """Handles ``torch.addmm(bias, input, weight)``."""
        if options or input.ndim != 1:
            return NotImplemented
        return self._apply(mat1, mat2, input, transposed=True)

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Any:
        if type(weight) is not TappedParameter or weight.ndim != 2 or type(x) is TappedParameter:
            return NotImplemented
        if not weight.numel() or (bias is not None and bias.shape != (weight.shape[1 if transposed else 0],)):
            return NotImplemented  # A bias of another shape is broadcast.
        device, kind, how = x.device, x.dtype, "dense"
        asks, autocast = backend_of(device).asks, None
        if torch.is_autocast_enabled(device.type) and kind != torch.float64:
            autocast = kind = torch.get_autocast_dtype(device.type)

        def dense(entries: Entries) -> bool:
            nonlocal how
            how = choose(entries, x.numel() // max(1, x.shape[-1]), kind, device, self._dense)
            # Where the host runs ahead of the device, an alias takes less of its time than a placeholder.
            return how == "dense" and not asks

        stand_in = stand_in_of(weight, dense)
        if stand_in is None and not (x.requires_grad and asks):
            return NotImplemented
        if stand_in is not None and stand_in.alias:
            if asks:
                return NotImplemented
            bias = substitute(bias)
            return torch.addmm(bias, x, stand_in.proxy) if transposed else F.linear(x, stand_in.proxy, bias)  # type: ignore[arg-type]
        if stand_in is not None and stand_in.entries is not None and how == "dense":
            return NotImplemented
        cast = None if autocast is None else self._cast(x, autocast)
        of_bias = stand_in_of(bias) if type(bias) is TappedParameter else None
        if of_bias is not None and of_bias.alias:
            bias, of_bias = of_bias.proxy, None
        remade = origin(x) if stand_in and cast is None else None
        setup = _Setup(stand_in, of_bias, how, transposed, remade, autocast)  # type: ignore[arg-type]
        placeholder, other = stand_in and stand_in.proxy, of_bias and of_bias.proxy
        return SampledLinear.apply(x, cast, weight, bias, placeholder, other, setup)

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Returns the input in autocast's dtype; None if it has that."""
        if x.dtype == dtype:
            return None
        version = -1 if x.is_inference() else x._version
        cast = self._last[2]() if self._last and self._last[0]() is x and self._last[1] == version >= 0 else None
        if cast is None:
            cast = x.detach().to(dtype)
            # Weak references: the graph keeps the converted input as long as it needs it.
            self._last = (weakref.ref(x), version, weakref.ref(cast))
        return cast


class SampledLinear(torch.autograd.Function):
    """``x W^T + b`` (or ``x W + b``); the backward makes the weight's gradient at its entries only, or as `Factors`.

    On a CPU it leaves out the tokens whose gradient is zero (`live_rows`).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        cast: Tensor | None,  # x in autocast's dtype
        weight: Tensor,
        bias: Tensor | None,
        placeholder: Tensor | None,
        bias_placeholder: Tensor | None,
        setup: _Setup,
    ) -> Tensor:
        ctx.setup, ctx.shape, ctx.dtype, ctx.bias_dtype = setup, x.shape, x.dtype, None if bias is None else bias.dtype
        weight, ctx.weight_dtype = weight.detach(), weight.dtype
        if setup.autocast is not None:
            weight = weight.to(setup.autocast)
            x, bias = x if cast is None else cast, None if bias is None else bias.to(setup.autocast)
        ctx.save_for_backward(
            x if setup.stand_in is not None and setup.origin is None else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        if bias is None and not setup.transposed:
            return F.linear(x, weight)
        matrix = weight if setup.transposed else weight.t()
        # Not a view of a product in two dimensions: a caller may change the output in place.
        out = x.new_empty(*x.shape[:-1], matrix.shape[1])
        flat, product = x.reshape(-1, x.shape[-1]), out.view(-1, matrix.shape[1])
        if bias is None:
            torch.mm(flat, matrix, out=product)
        else:
            torch.addmm(bias, flat, matrix, out=product)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, weight), setup, kind = ctx.saved_tensors, ctx.setup, gradient.device.type
        x = x if setup.origin is None else again(setup.origin)
        g = gradient.reshape(-1, gradient.shape[-1])
        if torch.is_grad_enabled():
            return _differentiable(ctx, g, x, weight)
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _gradients(ctx, g, x, weight)
        return _gradients(ctx, g, x, weight)


def _gradients(ctx: Any, g: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """Computes the gradients of the inputs of `SampledLinear` from that of its output, (T, out)."""
    setup, needs, tokens, rows = ctx.setup, ctx.needs_input_grad, g.shape[0], live_rows(g)
    grad_x = grad_bias = grad_placeholder = grad_bias_placeholder = None
    g = g if rows is None else g.index_select(0, rows)
    if needs[4] and x is not None:
        x = x.reshape(-1, x.shape[-1])
        x = x if rows is None else x.index_select(0, rows)
        left, right = (x, g) if setup.transposed else (g, x)
        stand_in = setup.stand_in
        if stand_in.pending is None:
            grad_placeholder = sampled_product(left, right, stand_in.entries, setup.how).to(stand_in.proxy.dtype)
        else:
            stand_in.pending.put(Factors(left, right, ctx.weight_dtype))
            grad_placeholder = torch.zeros_like(stand_in.proxy)
    if needs[5]:
        entries, dtype = setup.bias.entries.flat, setup.bias.proxy.dtype
        few = 8 * entries.numel() < g.shape[1]
        grad_bias_placeholder = (
            take_columns(g, entries).sum(0, dtype=dtype) if few else take(g.sum(0, dtype=dtype), entries)
        )
    if needs[3]:
        grad_bias = g.sum(0).to(ctx.bias_dtype)
    if weight is not None:
        grad_x = g @ (weight.t() if setup.transposed else weight)
        grad_x = grad_x if rows is None else spread_rows(grad_x, rows, tokens)
        grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
    return grad_x, None, None, grad_bias, grad_placeholder, grad_bias_placeholder, None


def _differentiable(ctx: Any, g: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """Runs the backward as differentiable operations on dense products, for gradient penalties and the like."""
    setup, live = ctx.setup, weight
    grad_x = grad_bias = grad_placeholder = grad_bias_placeholder = None
    if x is not None:
        if x.dtype != ctx.dtype:
            raise SelectionError(
                "a second derivative (create_graph=True) under autocast does not reach the sampled gradients' input; run this "
                "loss without autocast, or use unmask.select(..., gradients='dense')."
            )
        flat_x = x.reshape(-1, x.shape[-1])
        grad_placeholder = setup.stand_in.pass_on(flat_x.t() @ g if setup.transposed else g.t() @ flat_x)
        live = None if weight is None else ByPlaceholder.apply(setup.stand_in.proxy, weight, setup.stand_in)
    if live is not None:
        grad_x = (g @ (live.t() if setup.transposed else live)).view(ctx.shape).to(ctx.dtype)
    sums = g.sum(0)
    if ctx.needs_input_grad[3]:
        grad_bias = sums.to(ctx.bias_dtype)
    if setup.bias is not None:
        grad_bias_placeholder = take(sums, setup.bias.entries.flat).to(setup.bias.proxy.dtype)
    return grad_x, None, None, grad_bias, grad_placeholder, grad_bias_placeholder, None


def live_rows(g: Tensor) -> Tensor | None:
    """Finds the rows of an output's gradient (T, n) that are not zero: (t,) int64, ascending.

    Returns:
        The rows; None if more than `SHARE` of them are not zero, or if a sample of the rows holds no zero row.

    Example:
        >>> g = torch.zeros(100, 4)
        >>> g[7, 3] = 1.0
        >>> live_rows(g).tolist()
        [7]
    """
    if not backend_of(g.device).asks or g.shape[0] < LEAST or not g.shape[1]:
        return None
    # An odd stride. With an even one, and sequences of even length, the sample would look at the same positions of every
    # sequence and could miss the padding.
    step = g.shape[0] // _PROBE | 1
    if not (g[::step, :_FEW] == 0).all(1).any():
        return None
    silent = (g[:, :_FEW] == 0).all(1)
    maybe = silent.nonzero().squeeze(1)
    silent[maybe] = (g.index_select(0, maybe) == 0).all(1)
    live = (~silent).nonzero().squeeze(1)
    return live if live.numel() <= SHARE * g.shape[0] else None


def spread_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Puts rows (t, n) at their places among ``count`` rows of zeros."""
    return values.new_zeros(count, values.shape[1]).index_copy_(0, rows, values)


Node = Any  # A node of autograd's graph; its saved tensors are attributes.

# The activations whose output can be made again, by the name of their node: the saved tensors needed, and the function.
_AGAIN: dict[str, tuple[tuple[str, ...], Callable[[Node], Tensor]]] = {
    "GeluBackward0": (("_saved_self",), lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate)),
    "SiluBackward0": (("_saved_self",), lambda node: F.silu(node._saved_self)),
    "MulBackward0": (("_saved_self", "_saved_other"), lambda node: node._saved_self * node._saved_other),  # a gate
}


def origin(x: Tensor) -> Node | None:
    """Returns the node that can make x again; None if x must be saved.

    Example:
        >>> x = torch.nn.functional.gelu(torch.randn(3, requires_grad=True))
        >>> torch.equal(again(origin(x)), x)
        True
        >>> origin(x + 1) is None
        True
    """
    node = x.grad_fn
    found = None if node is None or x.output_nr else _AGAIN.get(node.name())
    if found is None:
        return None
    # Saved tensors that go through hooks (checkpointing, offloading) may be asked for only once each.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None or top(True) is not None:
        return None
    return node if all(isinstance(getattr(node, name, None), Tensor) for name in found[0]) else None


def again(node: Node) -> Tensor:
    """Makes the output of a node again."""
    return _AGAIN[node.name()][1](node)
