"""Keeps a linear layer's weight gradient as two factors, and multiplies them whole, at some entries, or where it is large.

The last functions of this file work on a gradient in any of its forms: dense, sparse in whole rows, or `Factors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from unmask.gradients.choice import choose, halves_pay
from unmask.gradients.entries import Entries, take_columns, take_gradient
from unmask.gradients.last_input import LastInput
from unmask.gradients.sampled import last_blocks, sampled_product
from unmask.gradients.triton_sampled import last_transposed

BAND = 1 << 18  # The entries of the product that are formed at a time.
NORMS = 128  # The tokens that are squared at a time on a CPU.
_MOST = 0.7  # The share of all entries that may be large, at most; above it the whole product is cheaper.
_SOME = 0.3  # The same share, above which the product in bfloat16 is cheaper, on CPUs that multiply it faster.
_FEW = 1 / 32  # The share of all entries that the product in bfloat16 may leave; above it the whole product is cheaper.
_HALF = 2.0**-8  # The largest relative error of rounding to bfloat16, whose significand has 8 bits.
_GATHER = 100.0  # The cost of gathering a column, in multiplications per token.


class Factors:
    """The product ``left^T right``, which is formed when it is needed and as far as it is needed.

    Args:
        left: (T, rows), with any strides and float dtype.
        right: (T, columns), of left's dtype and device.
        dtype: The dtype of the whole product.

    Example:
        >>> factors = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 3.0]]), torch.float32)
        >>> factors.dense().tolist()
        [[2.0, 3.0], [0.0, 0.0]]
        >>> [(flat.tolist(), values.tolist()) for flat, values in factors.above(lambda: 2.5)]
        [([1], [3.0])]
    """

    def __init__(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
        self.left, self.right, self.dtype = left, right, dtype
        self._whole: Tensor | None = None

    def dense(self) -> Tensor:
        """Forms the whole product, (rows, columns), exactly as autograd does; a second call returns the same tensor."""
        if self._whole is None:
            self._whole = (self.left.t() @ self.right).to(self.dtype)
        return self._whole

    def at(self, entries: Entries) -> Tensor:
        """Returns the product at m entries: (m,)."""
        if self._whole is None:
            how = choose(entries, self.left.shape[0], self.left.dtype, self.left.device)
            if how != "dense":
                return sampled_product(self.left, self.right, entries, how)
        return take_gradient(self.dense(), entries)

    def above(self, least: Callable[[], float]) -> Iterator[tuple[Tensor, Tensor]] | None:
        """Finds the entries of large magnitude.

        By Cauchy and Schwarz, ``|sum_t l[t, i] r[t, j]| <= |l[:, i]| |r[:, j]|``, so rows and columns whose norms are too
        small need no product. Where that rules out too little, a float32 product is formed in bfloat16 first, on CPUs that
        multiply it much faster (`halves_pay`). The same norms bound its error, and only the entries that it leaves are
        computed exactly.

        Args:
            least: Returns the least magnitude that still matters, a positive number. It is called again before each piece,
                and its answer may grow.

        Returns:
            An iterator over pieces: flat indices (n,) and values (n,). Together the pieces hold every entry of at least that
            magnitude, and perhaps some smaller ones. None if the whole product is cheaper, or if a factor is not finite.
        """
        rows, columns = _norms(self.left), _last_norms.of(self.right, _norms)
        tallest, widest = rows.max().item(), columns.max().item()
        if not math.isfinite(tallest * widest):
            return None
        # How far rounding may lift a computed entry over the bound by the norms, as a share of it.
        of_sum = self.left.shape[0] * torch.finfo(torch.float32).eps
        rounding = min(0.5, 1e-4 + of_sum + 4 * torch.finfo(self.left.dtype).eps)
        cut = least() * (1 - rounding)
        some, near = ((n * m >= cut).nonzero().squeeze(1) for n, m in ((rows, widest), (columns, tallest)))
        area = some.numel() * near.numel() / (rows.numel() * columns.numel())
        if area <= _SOME or not halves_pay(self.left):
            if area > _MOST:
                return None
            order = some[rows[some].argsort(descending=True)]
            return self._bands(order, rows, columns, lambda: least() * (1 - rounding))
        left, right = (
            x if kept.numel() == x.shape[1] else take_columns(x, kept)
            for x, kept in ((self.left, some), (self.right, near))
        )
        product = left.to(torch.bfloat16).t() @ right.to(torch.bfloat16)
        # The error, as a share of |left_i| |right_j|: of both rounded inputs, and of the sum in float32. The product itself is
        # rounded to bfloat16, too: hence the last factor.
        bound = (cut - (2.01 * _HALF + of_sum) * rows[some] * widest) * (1 - _HALF)
        row, column = (product.abs() >= bound.unsqueeze(1)).nonzero().unbind(1)
        if row.numel() > _FEW * rows.numel() * columns.numel():
            return None
        found = some[row] * columns.numel() + near[column]
        return iter([(found, self.at(Entries((rows.numel(), columns.numel()), found, found)))])

    def _bands(
        self, order: Tensor, rows: Tensor, columns: Tensor, least: Callable[[], float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Forms the product in bands of rows; the largest norms come first, for what they bring rules out other rows."""
        count = columns.numel()
        height = max(1, BAND // count)
        for low in range(0, order.numel(), height):
            band = order[low : low + height]
            cut = least()
            near = (columns * rows[band[0]] >= cut).nonzero().squeeze(1)
            if not near.numel():
                return
            some = near.numel() * (1 + _GATHER / band.numel()) < count  # Else the gathering costs more than it saves.
            right = take_columns(self.right, near) if some else self.right
            product = take_columns(self.left, band).t() @ right
            row, column = (product.abs() >= cut).nonzero().unbind(1)
            yield band[row] * count + (near[column] if some else column), product[row, column]


def _norms(x: Tensor) -> Tensor:
    """Returns the norm of each column: (columns,) float32, float64 for float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = torch.zeros(x.shape[1], dtype=wide, device=x.device)
    for piece in x.split(NORMS if x.device.type == "cpu" else max(1, x.shape[0])):
        total += piece.to(wide).square().sum(0)
    return total.sqrt_()


_last_norms = LastInput()


def forget() -> None:
    """Releases the activations that were kept for the next product; the end of a backward calls it."""
    for last in (_last_norms, last_blocks, last_transposed):
        last.forget()


class PendingGradient:
    """The sum of one tensor's whole gradient over its uses in a forward, while their backwards run.

    Each of autograd's graph tasks has its own sum. One task may run inside another (reentrant checkpointing), and a task that
    does not reach the tensor's stand-in (``torch.autograd.grad`` for the inputs alone) leaves a sum that nobody takes.

    Attributes:
        uses: The number of uses in the forward.
    """

    def __init__(self) -> None:
        self.uses = 0
        self._parts: dict[int, Tensor | Factors] = {}

    def put(self, part: Tensor | Factors) -> None:
        """Adds the gradient of one use."""
        task = torch._C._current_graph_task_id()
        if task in self._parts:
            part = add(self._parts[task], part)
        elif self.uses > 1 and isinstance(part, Factors):
            part = part.dense()
        self._parts[task] = part

    def take(self) -> Tensor | Factors:
        """Returns the sum over all uses in the running graph task, and forgets it."""
        part = self._parts.pop(torch._C._current_graph_task_id(), None)
        if part is None:
            raise AssertionError("autograd runs the backward of a use before that of the stand-in")
        return part


def as_dense(gradient: Tensor | Factors) -> Tensor:
    """Returns a whole gradient as a dense tensor."""
    if isinstance(gradient, Factors):
        return gradient.dense()
    return gradient.to_dense() if gradient.is_sparse else gradient


def gradient_at(gradient: Tensor | Factors, entries: Entries) -> Tensor:
    """Returns a whole gradient at m entries: (m,)."""
    return gradient.at(entries) if isinstance(gradient, Factors) else take_gradient(gradient, entries)


def add(a: Tensor | Factors, b: Tensor | Factors) -> Tensor:
    """Returns the sum of two gradients of one tensor; it is dense unless both are sparse in rows."""
    a, b = (part.dense() if isinstance(part, Factors) else part for part in (a, b))
    if a.is_sparse:
        a, b = b, a
    total = a + b
    return total.coalesce() if total.is_sparse else total


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm of all entries of several tensors together, without a copy of any of them.

    They have any shapes, floating dtypes and devices; a sparse one must be coalesced. The norm is 0-d, on the first one's device
    (on the CPU if there is none), and float64 if one of them is, else float32.

    Example:
        >>> total_norm([torch.tensor([[3.0]]), torch.tensor([4.0], dtype=torch.bfloat16)]).item()
        5.0
    """
    if not tensors:
        return torch.zeros(())
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    entries = [tensor.values() if tensor.is_sparse else tensor for tensor in tensors]
    norms = [torch.linalg.vector_norm(entry, dtype=wide).to(tensors[0].device) for entry in entries]
    return torch.linalg.vector_norm(torch.stack(norms))
