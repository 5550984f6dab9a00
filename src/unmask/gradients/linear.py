"""Operations that differentiate a tapped weight without a dense gradient: linear layers and embeddings.

They take the operation's place while its weight's tap is a token (see ``tap.py``), or while nothing is wanted of it: same
output, same input gradient. The weight's is made at the token's entries, or put into its `Pending` in a form that is not dense
yet. Whatever they do not know, autograd does, and its dense gradient is gathered. On a CPU a linear layer's backward leaves out
the tokens whose gradient is zero (``rows.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.errors import SelectionError
from unmask.gradients.entries import Entries, take
from unmask.gradients.factors import Factors
from unmask.gradients.sampled import Product, by_rows, choose, sampled_product, take_columns, take_gradient
from unmask.gradients.tapped import Handler, TappedParameter, set_of
from unmask.gradients.taps import Gather, Tapped, Whole


def handlers(dense: bool) -> dict[Any, Handler]:
    """Handlers for `TapSet.handlers`.

    Args:
        dense: Whether an operation may be left to autograd where the dense product is the cheaper one.
    """
    linear = _Linear(dense)
    return {F.linear: linear.linear, torch.addmm: linear.addmm, F.embedding: _embedding}


@dataclass(frozen=True)
class _Job:
    """What a sampled linear operation knows beside its tensors."""

    tapped: Tapped | None  # None: the weight's gradient is not wanted
    bias_entries: Entries | None
    how: Product  # where the token stands for some entries
    transposed: bool  # the weight is (in, out), as in transformers' Conv1D
    origin: Node | None  # what can make the input again; it is not saved then


class _Linear:
    """Handlers of linear operations; remembers the last input that autocast converted, for query, key and value share it."""

    def __init__(self, dense: bool) -> None:
        self._dense = dense
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def linear(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """``F.linear(input, weight, bias)``."""

        def bound(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
            return self._apply(input, weight, bias, transposed=False)

        return bound(*args, **kwargs)

    def addmm(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """``torch.addmm(bias, input, weight)``."""

        def bound(input: Tensor, mat1: Tensor, mat2: Tensor, **options: Any) -> Any:
            if options or input.ndim != 1:
                return NotImplemented
            return self._apply(mat1, mat2, input, transposed=True)

        return bound(*args, **kwargs)

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Any:
        if not isinstance(weight, TappedParameter) or weight.ndim != 2 or isinstance(x, TappedParameter):
            return NotImplemented
        if not weight.numel() or (bias is not None and bias.shape != (weight.shape[1 if transposed else 0],)):
            return NotImplemented  # a bias of another shape is broadcast
        tapped = set_of(weight).tap(weight)
        if tapped.alias if tapped else not x.requires_grad or x.device.type != "cpu":
            return NotImplemented
        cast = self._cast(x)
        how: Product = "dense"
        if tapped and tapped.entries is not None:
            dtype = x.dtype if cast is None else cast.dtype
            how = choose(tapped.entries, x.numel() // max(1, x.shape[-1]), dtype, x.device, self._dense)
            if how == "dense":
                return NotImplemented
        token, entries = None, None
        if isinstance(bias, TappedParameter):
            tap = set_of(bias).tap(bias)
            if tap is not None and tap.alias:
                bias = tap.proxy
            elif tap is not None:
                token, entries = tap.proxy, tap.entries
        job = _Job(tapped, entries, how, transposed, origin(x) if tapped and cast is None else None)
        return SampledLinear.apply(x, cast, weight, bias, tapped.proxy if tapped else None, token, job)

    def _cast(self, x: Tensor) -> Tensor | None:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind) or x.dtype == torch.get_autocast_dtype(kind) or x.dtype == torch.float64:
            return None
        version = -1 if x.is_inference() else x._version
        cast = self._last[2]() if self._last and self._last[0]() is x and self._last[1] == version >= 0 else None
        if cast is None:
            cast = x.detach().to(torch.get_autocast_dtype(kind))
            self._last = (weakref.ref(x), version, weakref.ref(cast))  # the graph keeps it, while it needs it
        return cast


class SampledLinear(torch.autograd.Function):
    """``x W^T + b`` (or ``x W + b``), whose backward makes the weight's gradient at its entries only, or as `Factors`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        cast: Tensor | None,  # x in autocast's dtype
        weight: Tensor,
        bias: Tensor | None,
        token: Tensor | None,
        bias_token: Tensor | None,
        job: _Job,
    ) -> Tensor:
        ctx.job, ctx.shape, ctx.dtype, ctx.bias_dtype = job, x.shape, x.dtype, None if bias is None else bias.dtype
        weight, ctx.weight_dtype = weight.detach(), weight.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            weight = weight.to(dtype)
            x, bias = x if cast is None else cast, None if bias is None else bias.to(dtype)
        ctx.save_for_backward(
            x if token is not None and job.origin is None else None,
            weight if ctx.needs_input_grad[0] else None,
            token,
            bias_token,
        )
        return _product(x, weight if job.transposed else weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, token, bias_token = ctx.saved_tensors
        x = x if ctx.job.origin is None else again(ctx.job.origin)
        g = gradient.reshape(-1, gradient.shape[-1])
        if torch.is_grad_enabled():
            if token is None:
                return _twice_frozen(ctx, g, weight, bias_token)
            return _twice(ctx, g, x, weight, token, bias_token)
        job, needs = ctx.job, ctx.needs_input_grad
        tokens, rows = g.shape[0], live_rows(g)
        g = g if rows is None else g.index_select(0, rows)
        with _without_autocast(g.device.type):
            grad_x = grad_bias = grad_token = grad_bias_token = None
            if needs[4]:
                flat_x = x.reshape(-1, x.shape[-1])
                flat_x = flat_x if rows is None else flat_x.index_select(0, rows)
                left, right = (flat_x, g) if job.transposed else (g, flat_x)
                if job.tapped.pending is None:
                    grad_token = sampled_product(left, right, job.tapped.entries, job.how).to(token.dtype)
                else:
                    job.tapped.pending.put(Factors(left, right, ctx.weight_dtype))
                    grad_token = torch.zeros_like(token)
            if needs[5]:
                grad_bias_token = _column_sums(g, job.bias_entries, bias_token.dtype)
            if needs[3]:
                grad_bias = g.sum(0).to(ctx.bias_dtype)
            if needs[0]:
                grad_x = g @ (weight.t() if job.transposed else weight)
                grad_x = grad_x if rows is None else spread_rows(grad_x, rows, tokens)
                grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, grad_bias, grad_token, grad_bias_token, None


def _product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ matrix + bias`` for x (..., in), not as a view of a product in two dimensions: a caller may change it in place."""
    out = x.new_empty(*x.shape[:-1], matrix.shape[1])
    flat, product = x.reshape(-1, x.shape[-1]), out.view(-1, matrix.shape[1])
    if bias is None:
        torch.mm(flat, matrix, out=product)
    else:
        torch.addmm(bias, flat, matrix, out=product)
    return out


def _column_sums(g: Tensor, entries: Entries, dtype: torch.dtype) -> Tensor:
    """A bias's gradient at entries."""
    if 8 * entries.flat.numel() < g.shape[1]:
        return take_columns(g, entries.flat).sum(0, dtype=dtype)
    return take(g.sum(0, dtype=dtype), entries.flat)


def _twice(
    ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, token: Tensor, bias_token: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The backward as differentiable operations on dense products: for gradient penalties and the like."""
    job = ctx.job
    if x.dtype != ctx.dtype:
        raise SelectionError(
            "a second derivative (create_graph=True) under autocast does not reach the sampled gradients' input; run this loss "
            "without autocast, or use unmask.select(..., gradients='dense')."
        )
    flat_x = x.reshape(-1, x.shape[-1])
    product = flat_x.t() @ g if job.transposed else g.t() @ flat_x
    grad_x, pending = None, job.tapped.pending
    if pending is None:
        grad_token = take(product, job.tapped.entries.flat).to(token.dtype)
    else:
        pending.put(product.detach())
        grad_token = torch.zeros_like(token)
    if weight is not None:
        live = (
            Gather.apply(token, weight, job.tapped.entries) if pending is None else Whole.apply(token, weight, pending)
        )
        grad_x = (g @ (live.t() if job.transposed else live)).view(x.shape)
    grad_bias, grad_bias_token = _twice_bias(ctx, g, bias_token)
    return grad_x, None, None, grad_bias, grad_token, grad_bias_token, None


def _twice_frozen(ctx: Any, g: Tensor, weight: Tensor, bias_token: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same where nothing is wanted of the weight."""
    grad_x = (g @ (weight.t() if ctx.job.transposed else weight)).view(ctx.shape).to(ctx.dtype)
    grad_bias, grad_bias_token = _twice_bias(ctx, g, bias_token)
    return grad_x, None, None, grad_bias, None, grad_bias_token, None


def _twice_bias(ctx: Any, g: Tensor, token: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    sums = g.sum(0)
    whole = sums.to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return whole, None if token is None else take(sums, ctx.job.bias_entries.flat).to(token.dtype)


def _without_autocast(kind: str) -> Any:
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _embedding(func: Any, args: tuple, kwargs: dict) -> Any:
    """``F.embedding``: gradients of the rows seen only, where the table has more rows than there are tokens."""

    def bound(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        if max_norm is not None or scale_grad_by_freq or not isinstance(weight, TappedParameter):
            return NotImplemented
        if weight.shape[0] <= input.numel():
            return NotImplemented
        tapped = set_of(weight).tap(weight)
        if tapped is None or tapped.alias:
            return NotImplemented
        return SampledEmbedding.apply(input, weight, tapped.proxy, tapped, padding_idx)

    return bound(*args, **kwargs)


class SampledEmbedding(torch.autograd.Function):
    """Rows of a table, whose backward makes the table's gradient in the rows seen only, or at its entries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, ids: Tensor, weight: Tensor, token: Tensor, tapped: Tapped, padding_idx: int | None
    ) -> Tensor:
        ctx.tapped, ctx.dtype, ctx.shape = tapped, token.dtype, weight.shape
        ctx.padding = None if padding_idx is None else padding_idx % weight.shape[0]
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight.detach(), padding_idx)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1]).to(ctx.dtype)
        rows = by_rows(g, ids.reshape(-1), ctx.shape, ctx.padding)
        if ctx.tapped.pending is None:
            return None, None, take_gradient(rows, ctx.tapped.entries), None, None
        ctx.tapped.pending.put(rows.detach())
        return None, None, g.new_zeros(1), None, None


LEAST = 64  # tokens below which nothing is looked for
SHARE = 0.85  # of the tokens, at most, must be left for leaving the others out to pay
_PROBE = 64  # rows that are looked at first
_FEW = 16  # columns that are looked at first


def live_rows(g: Tensor) -> Tensor | None:
    """The rows that are not zero.

    Args:
        g: (T, n), an output's gradient.

    Returns:
        (t,) int64, ascending; None where more than `SHARE` of the rows hold something, or zero rows are too few to be met in a
        sample.

    Example:
        >>> import torch
        >>> g = torch.zeros(100, 4)
        >>> g[7, 3] = 1.0
        >>> live_rows(g).tolist()
        [7]
    """
    if g.device.type != "cpu" or g.shape[0] < LEAST or not g.shape[1]:
        return None
    step = g.shape[0] // _PROBE | 1  # odd: sequences have even lengths, and every place in them must have its turn
    if not _silent(g[::step]).any():
        return None
    silent = _silent(g)
    maybe = silent.nonzero().squeeze(1)
    silent[maybe] = (g.index_select(0, maybe) == 0).all(1)
    live = (~silent).nonzero().squeeze(1)
    return live if live.numel() <= SHARE * g.shape[0] else None


def _silent(g: Tensor) -> Tensor:
    """Which rows may be zero."""
    return (g[:, :_FEW] == 0).all(1)


def spread_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Rows at their places among zeros: (t, n) as (count, n)."""
    return values.new_zeros(count, values.shape[1]).index_copy_(0, rows, values)


Node = Any  # an autograd node; its saved tensors are attributes


def _gated(node: Node) -> Tensor:
    return node._saved_self * node._saved_other


_AGAIN: dict[str, tuple[tuple[str, ...], Callable[[Node], Tensor]]] = {  # the saved tensors needed, and the function
    "GeluBackward0": (("_saved_self",), lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate)),
    "SiluBackward0": (("_saved_self",), lambda node: F.silu(node._saved_self)),
    "MulBackward0": (("_saved_self", "_saved_other"), _gated),  # a gated activation
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
