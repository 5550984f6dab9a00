"""Lets a compiler see operations on tapped tensors as plain ones and as *custom operators*, which it takes as they are.

An operator gets the placeholder of a tensor (`unmask.gradients.collector`) and the flat indices of its entries as ordinary
tensors, so nothing in a compiled graph depends on the state of taps. Its backward gives the placeholder its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.gradients.backend import backend_of
from unmask.gradients.choice import choose
from unmask.gradients.collector import entries_at
from unmask.gradients.embedding import embedding_gradient, embedding_gradient_at
from unmask.gradients.entries import take, take_gradient
from unmask.gradients.linear import live_rows
from unmask.gradients.sampled import sampled_product
from unmask.gradients.tapped import TappedParameter, is_raw, site_of


def in_graph(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an operation on tapped tensors inside a compiled graph, where the entries whose gradients are wanted are fixed."""
    if not torch.is_grad_enabled() or (args and isinstance(args[0], TappedParameter) and _raw(func)):
        return func(*args, **kwargs)
    if func is F.linear and len(args) > 1 and _wanted(args[1]) and not isinstance(args[0], TappedParameter):
        return _linear(*args, transposed=False, **kwargs)
    if func is torch.addmm and len(args) == 3 and not kwargs and _wanted(args[2]) and args[0].ndim == 1:
        return _linear(args[1], args[2], args[0], transposed=True)
    if func is F.embedding and len(args) > 1 and _wanted(args[1]):
        found = _embedding(*args, **kwargs)
        if found is not None:
            return found
    return func(*_copied(args), **_copied(kwargs))


_raw = torch.compiler.assume_constant_result(is_raw)  # type: ignore[no-untyped-call]  # A compiler does not know names.


def _wanted(tensor: Any) -> bool:
    return isinstance(tensor, TappedParameter) and site_of(tensor).part is not None


def _part(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the placeholder of a tensor that `_wanted` knows, and the flat indices of its entries."""
    part: Any = site_of(tensor).part
    return part.proxy, part.entries.flat


def _copied(value: Any) -> Any:
    """Returns a value, or a nest of lists, tuples and dicts, with a copy of each tensor that brings a gradient."""
    if _wanted(value):
        return weight(value.detach(), *_part(value))
    if type(value) in (list, tuple):
        return type(value)([_copied(item) for item in value])
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value


def _linear(x: Tensor, tensor: Tensor, bias: Tensor | None = None, *, transposed: bool) -> Tensor:
    matrix, bias, taps, kind = tensor.detach(), _copied(bias), site_of(tensor).taps, x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, matrix, bias = x.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype)
    return linear(x, matrix, bias, *_part(tensor), taps.sampled, taps.dense, transposed)


def _embedding(
    ids: Tensor,
    tensor: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if max_norm is not None or scale_grad_by_freq or tensor.shape[0] <= ids.numel():
        return None
    padding = None if padding_idx is None else padding_idx % tensor.shape[0]
    return embedding(ids, tensor.detach(), *_part(tensor), padding)


def _operator(schema: str) -> Callable[[Callable[..., Tensor]], Any]:
    """Makes the operator ``unmask::...`` of a function. It takes less time to call than one of `torch.library.custom_op`."""

    def make(function: Callable[..., Tensor]) -> Any:
        name = function.__name__
        torch.library.define(f"unmask::{name}", schema)
        torch.library.impl(f"unmask::{name}", "CompositeExplicitAutograd", function)
        return getattr(torch.ops.unmask, name).default

    return make


@_operator("(Tensor left, Tensor right, Tensor flat, Tensor like, bool sampled, bool dense, bool transposed) -> Tensor")
def product_at(
    left: Tensor, right: Tensor, flat: Tensor, like: Tensor, sampled: bool, dense: bool, transposed: bool
) -> Tensor:
    """Computes m entries of ``left^T right``: (m,) in the dtype of ``like``.

    Args:
        left: (T, rows).
        right: (T, columns), of left's dtype and device.
        flat: The row-major indices of the entries: (m,) int64, ascending.
        like: The placeholder: (m,).
        sampled: Allows a product that is not dense.
        dense: Allows the dense product.
        transposed: True if the output's gradient is ``right``.
    """
    entries, kind = entries_at(flat, left.shape[1], right.shape[1]), left.device.type
    how = choose(entries, left.shape[0], left.dtype, left.device, dense) if sampled else "dense"
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        if how == "dense":
            return take(left.t() @ right, flat).to(like.dtype)
        rows = live_rows(right if transposed else left)
        if rows is not None:
            left, right = left.index_select(0, rows), right.index_select(0, rows)
        return sampled_product(left, right, entries, how).to(like.dtype)


@torch.library.register_fake("unmask::product_at")  # type: ignore[untyped-decorator]
def _(left: Tensor, right: Tensor, flat: Tensor, like: Tensor, sampled: bool, dense: bool, transposed: bool) -> Tensor:
    return like.new_empty(like.shape)


@_operator("(Tensor g, Tensor ids, Tensor flat, Tensor like, int rows, int? padding) -> Tensor")
def embedding_at(g: Tensor, ids: Tensor, flat: Tensor, like: Tensor, rows: int, padding: int | None) -> Tensor:
    """Computes m entries of the gradient (rows, columns) of an embedding: (m,), as `product_at` does of a product.

    Args:
        g: The gradient of the output: (T, columns).
        ids: The row that each token read: (T,) int64.
        flat: The row-major indices of the entries: (m,) int64, ascending.
        like: The placeholder: (m,).
        rows: The rows of the table.
        padding: The row whose gradient is zero; None if there is none.
    """
    entries = entries_at(flat, rows, g.shape[1])
    g = g.to(like.dtype)
    if backend_of(g.device).asks:
        return take_gradient(embedding_gradient(g, ids, torch.Size(entries.shape), padding), entries)
    return embedding_gradient_at(g, ids, entries, padding)


@torch.library.register_fake("unmask::embedding_at")  # type: ignore[untyped-decorator]
def _(g: Tensor, ids: Tensor, flat: Tensor, like: Tensor, rows: int, padding: int | None) -> Tensor:
    return like.new_empty(like.shape)


@_operator(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor placeholder, Tensor flat, "
    "bool sampled, bool dense, bool transposed) -> Tensor"
)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    placeholder: Tensor,
    flat: Tensor,
    sampled: bool,
    dense: bool,
    transposed: bool,
) -> Tensor:
    """Computes ``x W^T + b``; the backward makes the weight's gradient at its entries only, for the placeholder.

    Args:
        x: (..., columns).
        weight: (rows, columns).
        bias: (rows,), or None.
        placeholder: (m,), which the result does not depend on.
        flat: The row-major indices of the entries of the weight: (m,) int64, ascending.
        sampled: Allows a product that is not dense; see `product_at`.
        dense: Allows the dense product.
        transposed: True for a weight (columns, rows); x must then be (T, columns), and there must be a bias.
    """
    return torch.addmm(bias, x, weight) if transposed and bias is not None else F.linear(x, weight, bias)


@torch.library.register_fake("unmask::linear")  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    *_, transposed = others
    return x.new_empty(*x.shape[:-1], weight.shape[1 if transposed else 0])


def _linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, placeholder, flat, *ctx.how = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, placeholder, flat)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight, placeholder, flat), (sampled, dense, transposed) = ctx.saved_tensors, ctx.how
    g, flat_x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    left, right = (flat_x, g) if transposed else (g, flat_x)
    at = product_at(left, right, flat, placeholder, sampled, dense, transposed)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (g @ (weight.t() if transposed else weight)).view(x.shape)
    if ctx.needs_input_grad[2]:
        grad_bias = g.sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, at, None, None, None, None


torch.library.register_autograd("unmask::linear", _linear_backward, setup_context=_linear_setup)


@_operator("(Tensor ids, Tensor table, Tensor placeholder, Tensor flat, int? padding) -> Tensor")
def embedding(ids: Tensor, table: Tensor, placeholder: Tensor, flat: Tensor, padding: int | None) -> Tensor:
    """Looks up rows of a table; the backward makes the table's gradient at its entries only, for the placeholder.

    Args:
        ids: int64, of any shape.
        table: (rows, columns).
        placeholder: (m,), which the result does not depend on.
        flat: The row-major indices of the entries of the table: (m,) int64, ascending.
        padding: The row whose gradient is zero, 0 or more; None if there is none.
    """
    return F.embedding(ids, table)


@torch.library.register_fake("unmask::embedding")  # type: ignore[untyped-decorator]
def _(ids: Tensor, table: Tensor, placeholder: Tensor, flat: Tensor, padding: int | None) -> Tensor:
    return table.new_empty(*ids.shape, table.shape[1])


def _embedding_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, table, placeholder, flat, ctx.padding = inputs
    ctx.rows = table.shape[0]
    ctx.save_for_backward(ids, placeholder, flat)


def _embedding_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    ids, placeholder, flat = ctx.saved_tensors
    g = gradient.reshape(-1, gradient.shape[-1])
    return None, None, embedding_at(g, ids.reshape(-1), flat, placeholder, ctx.rows, ctx.padding), None, None


torch.library.register_autograd("unmask::embedding", _embedding_backward, setup_context=_embedding_setup)


@_operator("(Tensor tensor, Tensor placeholder, Tensor flat) -> Tensor")
def weight(tensor: Tensor, placeholder: Tensor, flat: Tensor) -> Tensor:
    """Copies a tensor for any operation; the backward takes the gradient at the entries, for the placeholder."""
    return tensor.clone()


@torch.library.register_fake("unmask::weight")  # type: ignore[untyped-decorator]
def _(tensor: Tensor, placeholder: Tensor, flat: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def _weight_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _weight_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    placeholder, flat = ctx.saved_tensors
    return None, gradient.take(flat).to(placeholder.dtype), None


torch.library.register_autograd("unmask::weight", _weight_backward, setup_context=_weight_setup)
