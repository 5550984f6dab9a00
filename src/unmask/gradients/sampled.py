"""Computes chosen entries of a product ``g^T x``, as of a linear layer's weight gradient, and picks the cheapest way to do so."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unmask.gradients import triton_sampled
from unmask.gradients.entries import Entries, take_columns

Product = Literal["dense", "compact", "sampled"]
PIECE = 512  # The tokens of a piece on a CPU; half as many if the activations are wider than WIDE.
WIDE = 1024
DEPTH = 256  # The tokens of one block of a piece, which a dot product reads in one run.
LINE = 64  # The bytes of a cache line.
SHARED = 1 << 21  # The largest input, in scalars, whose blocks are kept for the next product.


@dataclass(frozen=True)
class Cost:
    """Nanoseconds per token that the parts of a product cost, all threads together; ``benchmarks/crossover.py`` measures them.

    Attributes:
        dense: The cost of one multiplication in a dense product.
        select: The cost of gathering one row or column for a dense product.
        transpose: The cost of transposing one scalar.
        dot: The cost of one entry of a sampled product.
        fixed: The cost of a sampled product that does not depend on its size.
    """

    dense: float
    select: float
    transpose: float
    dot: float
    fixed: float


# The CPU is an AMD EPYC with AVX-512 and 2 threads; float64 is scaled from float32. The numbers for CUDA come from the data
# sheet of an A100 and were not measured.
_CPU = {
    torch.float64: Cost(dense=0.02, select=1.5, transpose=0.6, dot=0.13, fixed=60.0),
    torch.float32: Cost(dense=0.0105, select=0.8, transpose=0.27, dot=0.065, fixed=60.0),
    torch.bfloat16: Cost(dense=0.0027, select=2.8, transpose=0.3, dot=0.06, fixed=60.0),
}
_CUDA = {
    torch.float32: Cost(dense=1.0e-4, select=5e-3, transpose=5e-3, dot=2e-3, fixed=0.02),
    torch.bfloat16: Cost(dense=8e-6, select=3e-3, transpose=3e-3, dot=1e-3, fixed=0.02),
}


def choose(entries: Entries, tokens: int, dtype: torch.dtype, device: torch.device, dense: bool = True) -> Product:
    """Returns the name of the product that gives a weight's wanted entries at the least cost.

    It is ``"dense"``, the whole product, where ``dense`` allows that; ``"compact"``, the dense product of the rows and columns
    that hold entries; or ``"sampled"``, the entries alone. The activations have ``tokens`` rows, and this dtype and device.
    """
    table = _CPU if device.type == "cpu" else _CUDA
    costs = table.get(dtype, table[torch.bfloat16])
    rows, columns = entries.shape
    some_rows, some_columns = spread(entries)
    gathered = some_rows * (some_rows < rows) + some_columns * (some_columns < columns)
    compact = costs.select * gathered + costs.dense * some_rows * some_columns
    sampled = costs.fixed + costs.transpose * (rows + columns) + costs.dot * entries.flat.numel()
    offers: dict[Product, float] = {"dense": costs.dense * rows * columns} if dense else {}
    offers["compact"] = compact
    if _has_sampled(dtype, device):
        offers["sampled"] = sampled * max(1.0, PIECE / max(1, tokens))
    return min(offers, key=offers.__getitem__)


def spread(entries: Entries) -> tuple[int, int]:
    """Returns the number of rows and the number of columns that hold entries."""
    return entries.used_rows.numel(), entries.used_columns.numel()


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
    if how == "compact" or not _has_sampled(g.dtype, g.device):
        rows, columns = entries.used_rows, entries.used_columns
        row, column = entries.rows, entries.columns
        if rows.numel() < g.shape[1]:
            g, row = take_columns(g, rows), torch.searchsorted(rows, row)
        if columns.numel() < x.shape[1]:
            x, column = take_columns(x, columns), torch.searchsorted(columns, column)
        return (g.t() @ x)[row, column].to(wide)
    if g.device.type != "cpu":
        return triton_sampled.triton_sampled_product(g, x, entries.rows, entries.columns)
    total = torch.zeros(entries.flat.shape, dtype=wide)
    pieces = _pieces(g.shape[0], max(entries.shape))

    def all_blocks(x: Tensor) -> list[Tensor]:
        return [_blocks(x[low:high], depth, wide, f"x from {low}") for low, high, depth in pieces]

    shared = last_blocks.of(x, all_blocks, wide, len(pieces)) if x.numel() <= SHARED else None
    for i, (low, high, depth) in enumerate(pieces):
        batch = (high - low) // depth  # A piece is a batch of products over blocks of tokens.
        zeros = torch.zeros(1, dtype=wide).expand(batch, total.numel())
        places = entries.starts.expand(batch, -1), entries.columns.expand(batch, -1)
        wanted = csr_matrix(*places, zeros, (batch, *entries.shape))
        blocks_g = _blocks(g[low:high], depth, wide, "g")
        blocks_x = shared[i] if shared else _blocks(x[low:high], depth, wide, "x")
        total += torch.sparse.sampled_addmm(wanted, blocks_g, blocks_x.transpose(1, 2), beta=0.0).values().sum(0)
    return total


def _has_sampled(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" or (dtype != torch.float64 and triton_sampled.available(device))


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


class LastInput(threading.local):
    """The result of a computation on the last input of a thread; the layers of query, key and value have the same input."""

    key: tuple | None = None
    x: Tensor | None = None  # A reference to the input keeps its address from being used by another tensor.
    result: Any = None

    def of(self, x: Tensor, compute: Callable[[Tensor], Any], *options: Any) -> Any:
        """Returns ``compute(x)``, which depends on x and the options alone; keeps it until another input or `forget`."""
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x._version, *options)
        if self.key != key:
            self.forget()  # The computation may write over the last result, and then fail.
            self.result = compute(x)
            self.key, self.x = key, x
        return self.result

    def forget(self) -> None:
        """Releases the input and the result; the end of a backward calls it."""
        self.key = self.x = self.result = None


last_blocks = LastInput()


class _Scratch(threading.local):
    """The memory that a thread keeps between calls."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns a buffer of ``numel`` scalars; its contents are arbitrary."""
        kept = self.buffers.get((name, dtype))
        if kept is None or kept.numel() < numel:
            kept = self.buffers[name, dtype] = torch.empty(numel, dtype=dtype)
        return kept[:numel]


_scratch = _Scratch()


def _blocks(piece: Tensor, depth: int, dtype: torch.dtype, name: str) -> Tensor:
    """Turns (n depth, columns) into (n, columns, depth) in ``dtype``: within a block, a column's tokens are contiguous."""
    tokens, columns = piece.shape
    stride = piece.stride(0)
    if piece.stride(1) != 1 or piece.dtype != dtype or _collides(stride * dtype.itemsize):
        stride = columns + LINE // dtype.itemsize if _collides(columns * dtype.itemsize) else columns
        padded = _scratch.take(name + " padded", tokens * stride, dtype).view(tokens, stride)[:, :columns]
        piece = padded.copy_(piece)
    blocks = _scratch.take(name, tokens * columns, dtype).view(tokens // depth, columns, depth)
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
