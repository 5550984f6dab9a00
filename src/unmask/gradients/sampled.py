"""Sampled products: entries of ``g^T x`` at given places, without the rest.

For a linear layer's weight, ``grad[i, j] = sum_t g[t, i] x[t, j]`` over tokens t. At m of its entries this costs a
transposition of g and x and m dot products, instead of a dense product of rows x columns.

- CPU: ``torch.sparse.sampled_addmm``, in float32 (float64 for float64), on pieces of `PIECE` tokens laid out in blocks of
  `DEPTH` tokens; temporaries are of the size of a piece, and half precision is converted piece by piece.
- CUDA: the Triton kernel in ``triton_sampled.py``.
- Anywhere, where few rows and columns hold all entries: the dense product of these rows and columns.

Which is cheapest is told by a cost model; its constants for CPUs follow what ``benchmarks/crossover.py`` measures.
"""

from __future__ import annotations

import functools
import threading
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmask.gradients import triton_sampled
from unmask.gradients.entries import Entries, take

Product = Literal["dense", "compact", "sampled"]
PIECE = 512  # tokens at a time on a CPU, and half as many of activations wider than WIDE
WIDE = 1024
DEPTH = 256  # tokens of one block of a piece: what a dot product reads in one go
LINE = 64  # bytes of a cache line
SHARED = 1 << 21  # the largest input, in scalars, whose blocks are kept for the next product


@dataclass(frozen=True)
class Cost:
    """Nanoseconds per token of the parts of a product, all threads together.

    Attributes:
        dense: Of one multiplication in a dense product.
        select: Of gathering one row or column for a dense product.
        transpose: Of transposing one scalar.
        dot: Of one entry of a sampled product.
        fixed: Of a sampled product whatever its size.
    """

    dense: float
    select: float
    transpose: float
    dot: float
    fixed: float


# CPU: an AMD EPYC with AVX-512, 2 threads; float64 scaled from float32. CUDA: from an A100's data sheet, not measured.
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
    """The cheapest product.

    Args:
        entries: The entries of the weight that are wanted.
        tokens: T, over which the product sums.
        dtype: The activations'.
        device: The activations'.
        dense: Whether the dense product may be chosen.
    """
    costs = _costs(dtype, device)
    rows, columns = entries.shape
    some_rows, some_columns = spread(entries)
    gathered = some_rows * (some_rows < rows) + some_columns * (some_columns < columns)
    compact = costs.select * gathered + costs.dense * some_rows * some_columns
    sampled = costs.fixed + costs.transpose * (rows + columns) + costs.dot * entries.flat.numel()
    offers: dict[Product, float] = {"dense": costs.dense * rows * columns} if dense else {}
    offers["compact"] = compact
    if _samples(dtype, device):
        offers["sampled"] = sampled * max(1.0, PIECE / max(1, tokens))
    return min(offers, key=offers.__getitem__)


def spread(entries: Entries) -> tuple[int, int]:
    """How many rows and how many columns hold entries."""
    return entries.used_rows.numel(), entries.used_columns.numel()


def sampled_product(g: Tensor, x: Tensor, entries: Entries, how: Product) -> Tensor:
    """``(g^T x)[entries]``.

    Args:
        g: (T, rows), any strides and float dtype.
        x: (T, columns), of g's dtype and device.
        entries: m entries of the (rows, columns) product.
        how: ``"compact"`` or ``"sampled"``, as `choose` said.

    Returns:
        (m,) float32, float64 for float64.

    Example:
        >>> g, x = torch.eye(3), torch.arange(6.0).view(3, 2)
        >>> entries = Entries((3, 2), torch.tensor([1, 4]), torch.tensor([0, 1]))
        >>> sampled_product(g, x, entries, "sampled").tolist()
        [1.0, 4.0]
    """
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    if not entries.flat.numel() or not g.shape[0]:
        return torch.zeros(entries.flat.shape, dtype=wide, device=g.device)
    if how == "compact" or not _samples(g.dtype, g.device):
        return _compact(g, x, entries).to(wide)
    if g.device.type == "cpu":
        return _on_cpu(g, x, entries, wide)
    return triton_sampled.triton_sampled_product(g, x, entries.rows, entries.columns)


def by_rows(g: Tensor, ids: Tensor, shape: torch.Size, padding: int | None) -> Tensor:
    """An embedding's gradient as a coalesced sparse tensor in whole rows, summed in the tokens' order.

    Args:
        g: (T, columns), the output's gradient.
        ids: (T,) int64, the row that each token read.
        shape: The embedding's.
        padding: A row whose gradient is zero; None for none.
    """
    if padding is not None:
        kept = (ids != padding).nonzero().squeeze(1)
        g, ids = g[kept], ids[kept]
    rows, inverse = ids.unique(return_inverse=True)
    sums = torch.zeros(rows.numel(), g.shape[1], dtype=g.dtype, device=g.device).index_add_(0, inverse, g)
    return torch.sparse_coo_tensor(rows[None], sums, shape, is_coalesced=True, check_invariants=False)


def take_gradient(gradient: Tensor, entries: Entries) -> Tensor:
    """A whole gradient's entries: (m,), of the gradient's dtype. Sparse gradients are coalesced, in whole rows."""
    return _take_rows(gradient, entries) if gradient.is_sparse else take(gradient, entries.flat)


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    """``x[:, columns]``. On a CPU a gather is faster than ``index_select``, in bfloat16 most."""
    if x.device.type == "cpu":
        return x.gather(1, columns.expand(x.shape[0], -1))
    return x.index_select(1, columns)


def _take_rows(gradient: Tensor, entries: Entries) -> Tensor:
    seen, values = gradient._indices()[0], gradient._values()
    taken = torch.zeros(entries.flat.shape, dtype=values.dtype, device=values.device)
    if not seen.numel():
        return taken
    place = torch.searchsorted(seen, entries.rows).clamp_(max=seen.numel() - 1)
    hit = (seen[place] == entries.rows).nonzero().squeeze(1)
    return taken.index_put((hit,), values[place[hit], entries.columns[hit]])


def _costs(dtype: torch.dtype, device: torch.device) -> Cost:
    table = _CPU if device.type == "cpu" else _CUDA
    return table.get(dtype, table[torch.bfloat16])


def _samples(dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" or (dtype != torch.float64 and triton_sampled.available(device))


def _compact(g: Tensor, x: Tensor, entries: Entries) -> Tensor:
    """The dense product of the rows and columns that hold entries."""
    rows, columns = entries.used_rows, entries.used_columns
    row, column = entries.rows, entries.columns
    if rows.numel() < g.shape[1]:
        g, row = take_columns(g, rows), torch.searchsorted(rows, row)
    if columns.numel() < x.shape[1]:
        x, column = take_columns(x, columns), torch.searchsorted(columns, column)
    return (g.t() @ x)[row, column]


def _on_cpu(g: Tensor, x: Tensor, entries: Entries, wide: torch.dtype) -> Tensor:
    total = torch.zeros(entries.flat.shape, dtype=wide)
    pieces = _pieces(g.shape[0], max(entries.shape))
    shared = _shared(x, pieces, wide)
    for i, (low, high, depth) in enumerate(pieces):
        mask = _csr(entries, (high - low) // depth, wide)
        blocks_g = _blocks(g[low:high], depth, wide, "g")
        blocks_x = shared[i] if shared else _blocks(x[low:high], depth, wide, "x")
        total += torch.sparse.sampled_addmm(mask, blocks_g, blocks_x.transpose(1, 2), beta=0.0).values().sum(0)
    return total


def _pieces(tokens: int, width: int) -> list[tuple[int, int, int]]:
    """(first token, end, depth of the blocks) of each piece."""
    piece = PIECE if width <= WIDE else PIECE // 2
    whole = tokens - tokens % piece
    pieces = [(low, low + piece, DEPTH) for low in range(0, whole, piece)]
    while whole < tokens:
        depth = min(DEPTH, tokens - whole)
        pieces.append((whole, whole + depth, depth))
        whole += depth
    return pieces


class _Scratch(threading.local):
    """Memory that is kept between calls, a thread's own."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.shared: tuple[tuple, Tensor, list[Tensor]] | None = None

    def take(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A buffer of some size, its contents arbitrary."""
        kept = self.buffers.get((name, dtype))
        if kept is None or kept.numel() < numel:
            kept = self.buffers[name, dtype] = torch.empty(numel, dtype=dtype)
        return kept[:numel]


_scratch = _Scratch()


def forget() -> None:
    """A backward is over: lets go of its activations."""
    _scratch.shared = None


def _shared(x: Tensor, pieces: list[tuple[int, int, int]], dtype: torch.dtype) -> list[Tensor] | None:
    """The blocks of an input that the next product may use as well: query, key and value share theirs."""
    if x.numel() > SHARED:
        return None
    key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version, dtype, len(pieces))
    if _scratch.shared is None or _scratch.shared[0] != key:
        blocks = [_blocks(x[low:high], depth, dtype, f"x from {low}") for low, high, depth in pieces]
        _scratch.shared = (key, x, blocks)  # x is held, so that its address stays its own
    return _scratch.shared[2]


def _blocks(piece: Tensor, depth: int, dtype: torch.dtype, name: str) -> Tensor:
    """(n depth, columns) as (n, columns, depth), in ``dtype``: each column's tokens side by side within a block."""
    tokens, columns = piece.shape
    stride = piece.stride(0)
    if piece.stride(1) != 1 or piece.dtype != dtype or _shares_sets(stride * dtype.itemsize):
        stride = columns + LINE // dtype.itemsize if _shares_sets(columns * dtype.itemsize) else columns
        padded = _scratch.take(name + " padded", tokens * stride, dtype).view(tokens, stride)[:, :columns]
        piece = padded.copy_(piece)
    blocks = _scratch.take(name, tokens * columns, dtype).view(tokens // depth, columns, depth)
    return blocks.copy_(piece.as_strided(blocks.shape, (depth * stride, 1, stride), piece.storage_offset()))


def _shares_sets(stride: int) -> bool:
    """Whether rows so many bytes apart lie in few of a cache's sets: an odd number of lines reaches all of them."""
    return stride % (2 * LINE) == 0


def _csr(entries: Entries, batch: int, dtype: torch.dtype) -> Tensor:
    _quiet()
    count = entries.flat.numel()
    return torch.sparse_csr_tensor(
        entries.starts.expand(batch, -1),
        entries.columns.expand(batch, -1),
        torch.zeros(1, dtype=dtype).expand(batch, count),
        size=(batch, *entries.shape),
        check_invariants=False,
    )


@functools.cache
def _quiet() -> None:
    """Takes torch's one warning that sparse CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
