"""Computes chosen entries of a product ``g^T x`` on a GPU, by a Triton kernel, which the first call compiles."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.errors import SelectionError
from unmask.gradients.last_input import LastInput

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOKENS = 2048  # The tokens of a chunk; fewer for very wide operands.
_COPY = 1 << 26  # The scalars in one token-contiguous copy.
_ENTRIES, _LINE = 16, 512  # The entries of a program, and the bytes of a row that it reads at a time.
_TILE = 64  # The side of a block of the transposing copy.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # Triton's defaults differ between its versions.


def available(device: torch.device | str) -> bool:
    """Returns True if `triton_sampled_product` runs on a device. Once per process it tries a small product there.

    Args:
        device: A CUDA or ROCm device; the CPU works only under Triton's interpreter, ``TRITON_INTERPRET=1``.

    Example:
        >>> available("meta")
        False
    """
    device = torch.device(device)
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (interpreted or (device.type == "cuda" and torch.cuda.is_available())) and _works(device)


def triton_sampled_product(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Computes ``p_k = sum_t g[t, rows_k] x[t, columns_k]``: chosen entries of a linear layer's weight gradient.

    Products and sums are float32 (no TF32). The operands are copied token-contiguous, a chunk of tokens at a time, so that a
    dot product reads whole cache lines. There are no atomics: the dtype and the shapes alone give the order in which an entry's
    terms are added, so equal calls give equal bits, which do not depend on the other entries.

    Args:
        g: The output gradient: (T, out) float32, bfloat16 or float16, with any strides.
        x: The input: (T, in), of g's dtype and device.
        rows: The rows of the entries: (m,) int32 or int64 in [0, out). They are not checked, as that would wait for the device.
        columns: Their columns: (m,) int32 or int64 in [0, in), not checked either. Entries may repeat. Entries sorted by
            (row, column) are the fastest.

    Returns:
        (m,) float32 on g's device. Meanwhile, up to 2048 tokens of g and x are held transposed. If there are no more, x is so
        until another input comes or the backward ends: the layers of query, key and value have the same one.

    Raises:
        SelectionError: Shapes, dtypes or devices do not fit, or Triton does not run on the device.

    Example:
        >>> g, x, at = torch.ones(3, 2), torch.ones(3, 4), torch.tensor([1])
        >>> triton_sampled_product(g, x, at, at).tolist() if available(g.device) else [3.0]
        [3.0]
    """
    wrong = None
    if g.ndim != 2 or x.ndim != 2 or len(g) != len(x) or rows.ndim != 1 or rows.shape != columns.shape:
        wrong = "their shapes must be (T, out), (T, in), (m,) and (m,)"
    elif g.dtype not in DTYPES or x.dtype != g.dtype or not {rows.dtype, columns.dtype} <= {torch.int32, torch.int64}:
        wrong = f"g and x need one of {DTYPES}, the others an integer"
    elif any(v.device != g.device for v in (x, rows, columns)):
        wrong = "move them to one device"
    if wrong is not None:
        given = ", ".join(f"{str(v.dtype)[6:]} {tuple(v.shape)} on {v.device}" for v in (g, x, rows, columns))
        raise SelectionError(f"g, x, rows, columns are {given}; {wrong}.")
    if not available(g.device):
        raise SelectionError(f"Triton does not run on {str(g.device)!r}; ask available(), and use plain torch instead.")
    return _product(g, x, rows, columns)


@cache
def _works(device: torch.device) -> bool:
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    try:
        return bool(_product(one, one, zero, zero).item() == 1)
    except ModuleNotFoundError:
        return False
    except Exception as error:  # An old device, a driver or a missing compiler shows here, and not in training.
        warnings.warn(f"Triton does not run on {device}, plain torch is used instead: {error}", stacklevel=2)
        return False


def _product(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    m, tokens = rows.numel(), len(g)
    if m == 0 or tokens == 0:
        return torch.zeros(m, dtype=torch.float32, device=g.device)
    out = torch.empty(m, dtype=torch.float32, device=g.device)
    block = _LINE // g.element_size()  # In tokens; a multiple of _TILE.
    chunk = max(block, min(_TOKENS, _COPY // max(g.shape[1], x.shape[1]) // block * block))
    sizes = {"E": _ENTRIES, "BT": block, **_OPTIONS}
    rows, columns = rows.contiguous(), columns.contiguous()
    row = min(chunk, _blocks(tokens, block) * block)
    gt = g.new_empty(g.shape[1], row)
    with torch.cuda.device_of(g):
        xt = x.new_empty(x.shape[1], row) if tokens > chunk else _transposed(g, x, gt)
        for low in range(0, tokens, chunk):
            # Zeros follow the last token, so no load is masked.
            length = _blocks(min(chunk, tokens - low), block) * block
            if tokens > chunk:
                _transpose(g[low : low + chunk], x[low : low + chunk], gt, xt, length)
            _kernels()[1][(_blocks(m, _ENTRIES),)](gt, xt, rows, columns, out, m, m if low else 0, length, row, **sizes)
    return out


last_transposed = LastInput()


def _transposed(g: Tensor, x: Tensor, gt: Tensor) -> Tensor:
    """Copies g token-contiguous into ``gt``, and returns such a copy of x; the layers of query, key and value share that."""
    length, new = gt.shape[1], False

    def both(x: Tensor) -> Tensor:
        nonlocal new
        new, xt = True, x.new_empty(x.shape[1], length)
        _transpose(g, x, gt, xt, length)
        return xt

    xt: Tensor = last_transposed.of(x, both, length)
    if not new:
        _transpose(g, None, gt, None, length)
    return xt


def _transpose(g: Tensor, x: Tensor | None, gt: Tensor, xt: Tensor | None, length: int) -> None:
    """Copies up to ``length`` tokens of g, and of x if it is given, token-contiguous, by one launch."""
    blocks = _blocks(g.shape[1], _TILE)
    grid = (blocks + (0 if x is None else _blocks(x.shape[1], _TILE)), length // _TILE)
    x, xt = (g, gt) if x is None or xt is None else (x, xt)
    shapes = (len(g), g.shape[1], x.shape[1], *g.stride(), *x.stride(), gt.shape[1], xt.shape[1], blocks)
    _kernels()[0][grid](g, x, gt, xt, *shapes, B=_TILE, **_OPTIONS)


def _blocks(total: int, size: int) -> int:
    return -(-total // size)


_copy_block: Any = None  # `_copy_block_kernel`, once it was made one of Triton's functions


@cache
def _kernels() -> tuple[Any, Any]:
    """Returns the two kernels. Triton compiles them once per dtype: `do_not_specialize` keeps it from doing so per size."""
    global tl, _copy_block
    import triton
    import triton.language as tl

    _copy_block = triton.jit(_copy_block_kernel)
    transpose = triton.jit(_transpose_kernel, do_not_specialize=["tokens", "blocks"])
    return transpose, triton.jit(_sample_kernel, do_not_specialize=["m", "begun", "length"])


def _copy_block_kernel(source, target, tokens, width, stride_t, stride_w, row, block, B: tl.constexpr):  # type: ignore[no-untyped-def]
    w = block * B + tl.arange(0, B).to(tl.int64)
    t = tl.program_id(1) * B + tl.arange(0, B).to(tl.int64)
    inside = (t < tokens)[:, None] & (w < width)[None, :]
    values = tl.load(source + t[:, None] * stride_t + w[None, :] * stride_w, mask=inside, other=0.0)  # (B tokens, B)
    tl.store(target + w[:, None] * row + t[None, :], tl.trans(values), mask=(w < width)[:, None])


def _transpose_kernel(  # type: ignore[no-untyped-def]
    g, x, gt, xt, tokens, g_width, x_width, g_t, g_w, x_t, x_w, g_row, x_row, blocks, B: tl.constexpr
):
    block = tl.program_id(0)
    if block < blocks:
        _copy_block(g, gt, tokens, g_width, g_t, g_w, g_row, block, B)
    else:
        _copy_block(x, xt, tokens, x_width, x_t, x_w, x_row, block - blocks, B)


def _sample_kernel(gt, xt, rows, columns, out, m, begun, length, row, E: tl.constexpr, BT: tl.constexpr):  # type: ignore[no-untyped-def]
    k = tl.program_id(0).to(tl.int64) * E + tl.arange(0, E)
    inside = k < m
    r = tl.load(rows + k, mask=inside, other=0).to(tl.int64) * row
    c = tl.load(columns + k, mask=inside, other=0).to(tl.int64) * row
    total = tl.zeros((E, BT), tl.float32)
    for start in range(0, length, BT):
        t = start + tl.arange(0, BT)
        a = tl.load(gt + r[:, None] + t[None, :])  # (E, BT)
        b = tl.load(xt + c[:, None] + t[None, :])
        total += a.to(tl.float32) * b.to(tl.float32)
    earlier = tl.load(out + k, mask=k < begun, other=0.0)  # the sum over earlier chunks of tokens
    tl.store(out + k, earlier + tl.sum(total, axis=1), mask=inside)
