"""Computes chosen entries of a product ``g^T x``, as of a linear layer's weight gradient."""

from __future__ import annotations

import functools
import threading
import warnings
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from unmask.gradients.backend import backend_of, gathered_product
from unmask.gradients.entries import Entries, take_columns
from unmask.gradients.last_input import LastInput

Product = Literal["dense", "compact", "sampled"]
PIECE = 512  # The tokens of a piece on a CPU; half as many if the activations are wider than WIDE.
WIDE = 1024
DEPTH = 256  # The tokens of one block of a piece, which a dot product reads in one run.
ROWS = (
    1 << 14
)  # The rows of a weight whose gradients are laid out at a time: those of a language model's head are many.
LINE = 64  # The bytes of a cache line.
SHARED = 1 << 21  # The largest input, in scalars, whose blocks are kept for the next product.


def sampled_product(g: Tensor, x: Tensor, entries: Entries, how: Product) -> Tensor:
    """Computes m entries of ``g^T x``: (m,) float32, float64 for float64.

    On a CPU, ``"sampled"`` holds temporaries of the size of a piece of `PIECE` tokens, and converts half precision by the piece.

    Args:
        g: (T, rows), with any strides and float dtype.
        x: (T, columns), of g's dtype and device.
        entries: The m entries of the (rows, columns) product.
        how: ``"compact"`` or ``"sampled"``, the answer of `choose`.

    Example:
        >>> g, x = torch.eye(3), torch.arange(6.0).view(3, 2)
        >>> entries = Entries((3, 2), torch.tensor([1, 4]), torch.tensor([0, 1]))
        >>> sampled_product(g, x, entries, "sampled").tolist()
        [1.0, 4.0]
    """
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    if not entries.flat.numel() or not g.shape[0]:
        return torch.zeros(entries.flat.shape, dtype=wide, device=g.device)
    backend = backend_of(g.device)
    if how == "compact":
        rows, columns = entries.used_rows, entries.used_columns
        row, column = entries.rows, entries.columns
        if rows.numel() < g.shape[1]:
            g, row = take_columns(g, rows), torch.searchsorted(rows, row)
        if columns.numel() < x.shape[1]:
            x, column = take_columns(x, columns), torch.searchsorted(columns, column)
        return (g.t() @ x)[row, column].to(wide)
    if backend.sampled is not None:
        product = gathered_product if wide == torch.float64 else backend.sampled
        return product(g, x, entries.rows, entries.columns)
    total = torch.zeros(entries.flat.shape, dtype=wide)
    pieces, bands = _pieces(g.shape[0], max(entries.shape)), _bands(entries)

    def all_blocks(x: Tensor) -> list[Tensor]:
        return [_blocks(x[low:high], depth, wide, f"x from {low}") for low, high, depth in pieces]

    shared = last_blocks.of(x, all_blocks, wide, len(pieces)) if x.numel() <= SHARED else None
    for i, (low, high, depth) in enumerate(pieces):
        batch = (high - low) // depth  # A piece is a batch of products over blocks of tokens.
        blocks_x = shared[i] if shared else _blocks(x[low:high], depth, wide, "x")
        for top, stop, first, last, starts in bands:
            zeros = torch.zeros(1, dtype=wide).expand(batch, last - first)
            held = entries.columns[first:last].expand(batch, -1)
            wanted = csr_matrix(starts.expand(batch, -1), held, zeros, (batch, stop - top, entries.shape[1]))
            blocks_g = _blocks(g[low:high, top:stop], depth, wide, "g")
            found = torch.sparse.sampled_addmm(wanted, blocks_g, blocks_x.transpose(1, 2), beta=0.0)
            total[first:last] += found.values().sum(0)
    return total


def _pieces(tokens: int, width: int) -> list[tuple[int, int, int]]:
    """Returns each piece as (first token, end, depth of its blocks)."""
    piece = PIECE if width <= WIDE else PIECE // 2
    whole = tokens - tokens % piece
    pieces = [(low, low + piece, DEPTH) for low in range(0, whole, piece)]
    while whole < tokens:
        depth = min(DEPTH, tokens - whole)
        pieces.append((whole, whole + depth, depth))
        whole += depth
    return pieces


def _bands(entries: Entries) -> list[tuple[int, int, int, int, Tensor]]:
    """Returns bands of at most `ROWS` rows, without those that hold no entry.

    A band is its first row and end, its first entry and end, and the place among its entries where each row's start.
    """
    edges = [*range(0, entries.shape[0], ROWS), entries.shape[0]]
    if len(edges) <= 2:
        return [(0, entries.shape[0], 0, entries.flat.numel(), entries.starts)]
    held = pairwise(entries.starts[edges].tolist())
    return [
        (top, stop, first, last, entries.starts[top : stop + 1] - first)
        for (top, stop), (first, last) in zip(pairwise(edges), held, strict=True)
        if first < last
    ]


last_blocks = LastInput()


_buffers: dict[tuple[int, str, torch.dtype], Tensor] = {}  # the scratch memory that each thread keeps between products


def _buffer(name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Returns a buffer of ``numel`` scalars; its contents are arbitrary."""
    key = (threading.get_ident(), name, dtype)
    kept = _buffers.get(key)
    if kept is None or kept.numel() < numel:
        kept = _buffers[key] = torch.empty(numel, dtype=dtype)
    return kept[:numel]


def release_buffers() -> None:
    """Releases the scratch memory of all threads; the end of a selection calls it."""
    _buffers.clear()


def _blocks(piece: Tensor, depth: int, dtype: torch.dtype, name: str) -> Tensor:
    """Turns (n depth, columns) into (n, columns, depth) in ``dtype``: within a block, a column's tokens are contiguous."""
    tokens, columns = piece.shape
    stride = piece.stride(0)
    if piece.stride(1) != 1 or piece.dtype != dtype or _collides(stride * dtype.itemsize):
        stride = columns + LINE // dtype.itemsize if _collides(columns * dtype.itemsize) else columns
        padded = _buffer(name + " padded", tokens * stride, dtype).view(tokens, stride)[:, :columns]
        piece = padded.copy_(piece)
    blocks = _buffer(name, tokens * columns, dtype).view(tokens // depth, columns, depth)
    return blocks.copy_(piece.as_strided(blocks.shape, (depth * stride, 1, stride), piece.storage_offset()))


def _collides(stride: int) -> bool:
    """Returns True if rows this many bytes apart fall into few of a cache's sets; an odd number of lines reaches all."""
    return stride % (2 * LINE) == 0


def csr_matrix(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Makes a sparse CSR tensor, unchecked and without torch's warning that such tensors are in beta.

    Args:
        starts: (..., rows + 1) int64, the place where each row's entries start.
        columns: (..., m) int64, ascending within a row.
        values: (..., m).
        size: The shape (..., rows, columns).
    """
    _take_beta_warning()
    return torch.sparse_csr_tensor(starts, columns, values, size=size, check_invariants=False)


@functools.cache
def _take_beta_warning() -> None:
    with warnings.catch_warnings():  # Torch warns once per process, here and not in the user's code.
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
