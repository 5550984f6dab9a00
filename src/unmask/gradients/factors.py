"""A linear layer's weight gradient as the product it is: formed whole, at some entries, or where it can be large.

By Cauchy and Schwarz, ``|sum_t l[t, i] r[t, j]| <= |l[:, i]| |r[:, j]|``. So when only entries above some value matter, as to a
ranking whose running cut-off is known, rows and columns whose norms are too small need no product at all. Where that rules out
too little, a float32 product is formed in bfloat16 first, on CPUs that multiply it faster: the same norms bound its error, and
only the entries that it leaves are computed exactly.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unmask.gradients import sampled
from unmask.gradients.entries import Entries
from unmask.gradients.sampled import choose, sampled_product, take_columns, take_gradient

BAND = 1 << 18  # entries of the product formed at a time
NORMS = 128  # tokens squared at a time
_MOST = 0.7  # of all entries: if more can be large, the whole product is the cheaper way
_SOME = 0.3  # of all entries: if more can be large, the product in bfloat16 is the cheaper way, where it is cheap
_FEW = 1 / 32  # of all entries: if it leaves more, it was in vain
_HALF = 2.0**-8  # twice the rounding error of bfloat16, relative
_GATHER = 100.0  # what gathering a column costs, in multiplications per token


class Factors:
    """``left^T right``, not formed yet.

    Args:
        left: (T, rows), any strides and float dtype.
        right: (T, columns), of left's dtype and device.
        dtype: What the whole product is cast to.

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
        """The whole product, (rows, columns), as autograd forms it."""
        if self._whole is None:
            self._whole = (self.left.t() @ self.right).to(self.dtype)
        return self._whole

    def at(self, entries: Entries) -> Tensor:
        """The product at entries: (m,)."""
        if self._whole is None:
            how = choose(entries, self.left.shape[0], self.left.dtype, self.left.device)
            if how != "dense":
                return sampled_product(self.left, self.right, entries, how)
        return take_gradient(self.dense(), entries)

    def above(self, least: Callable[[], float]) -> Iterator[tuple[Tensor, Tensor]] | None:
        """Entries of large magnitude: flat indices (n,) and values (n,), in pieces.

        Args:
            least: The least magnitude that still matters, positive; asked again before each piece, and may grow.

        Returns:
            An iterator whose pieces together hold every entry of at least that magnitude; None where the whole product is
            the cheaper way, or a factor is not finite.
        """
        rows, columns = _norms(self.left), _shared_norms(self.right)
        tallest, widest = rows.max().item(), columns.max().item()
        if not math.isfinite(tallest * widest):
            return None
        cut = least() * (1 - self._rounding())
        some, near = ((n * m >= cut).nonzero().squeeze(1) for n, m in ((rows, widest), (columns, tallest)))
        area = some.numel() * near.numel() / (rows.numel() * columns.numel())
        if area > _SOME and _halves_pay(self.left):
            found = self._roughly(some, near, rows, cut)
            return None if found is None else iter([(found, self.at(self._entries(found)))])
        if area > _MOST:
            return None
        return self._bands(some[rows[some].argsort(descending=True)], rows, columns, least)

    def _roughly(self, some: Tensor, near: Tensor, rows: Tensor, cut: float) -> Tensor | None:
        """Flat indices (n,), ascending, of all entries but those whose product in bfloat16 rules them out; None if too many."""
        left, right = (
            x if kept.numel() == x.shape[1] else take_columns(x, kept)
            for x, kept in ((self.left, some), (self.right, near))
        )
        product = left.to(torch.bfloat16).t() @ right.to(torch.bfloat16)
        widest = _shared_norms(self.right).max()
        error = (
            1.01 * _HALF + self.left.shape[0] * torch.finfo(torch.float32).eps
        )  # of |left_i| |right_j|: inputs, and the sum
        bound = (cut - error * rows[some] * widest) * (1 - _HALF)  # the product itself is rounded, too
        row, column = (product.abs() >= bound.unsqueeze(1)).nonzero().unbind(1)
        if row.numel() > _FEW * rows.numel() * self.right.shape[1]:
            return None
        return some[row] * self.right.shape[1] + near[column]

    def _entries(self, flat: Tensor) -> Entries:
        return Entries((self.left.shape[1], self.right.shape[1]), flat, flat)

    def _bands(
        self, order: Tensor, rows: Tensor, columns: Tensor, least: Callable[[], float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the largest norms first, so that what they bring rules out more of the others."""
        count, keep = columns.numel(), 1 - self._rounding()
        height = max(1, BAND // count)
        for low in range(0, order.numel(), height):
            band = order[low : low + height]
            cut = least() * keep
            near = (columns * rows[band[0]] >= cut).nonzero().squeeze(1)
            if not near.numel():
                return
            some = near.numel() * (1 + _GATHER / band.numel()) < count  # else gathering them costs more than it saves
            right = take_columns(self.right, near) if some else self.right
            product = take_columns(self.left, band).t() @ right
            row, column = (product.abs() >= cut).nonzero().unbind(1)
            yield band[row] * count + (near[column] if some else column), product[row, column]

    def _rounding(self) -> float:
        """How far rounding may lift an entry over its bound, relative."""
        tokens = self.left.shape[0] * torch.finfo(torch.float32).eps
        return min(0.5, 1e-4 + tokens + 4 * torch.finfo(self.left.dtype).eps)


def _halves_pay(x: Tensor) -> bool:
    """Whether a product of float32 factors is much faster in bfloat16, summed in float32."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and _cpu_multiplies_halves()


@functools.cache
def _cpu_multiplies_halves() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


class Pending:
    """What the uses of one tensor in one forward bring in a backward; handed over when all have run.

    Each of autograd's graph tasks has a sum of its own: one task may run inside another (reentrant checkpointing), and one that
    does not reach the tensor's tap (``torch.autograd.grad`` for the inputs) leaves a sum that nobody takes.
    """

    def __init__(self) -> None:
        self.uses = 0
        self._parts: dict[int, Tensor | Factors] = {}

    def put(self, part: Tensor | Factors) -> None:
        """A use's backward ran."""
        task = torch._C._current_graph_task_id()
        if task in self._parts:
            part = add(self._parts[task], part)
        elif self.uses > 1 and isinstance(part, Factors):
            part = part.dense()
        self._parts[task] = part

    def take(self) -> Tensor | Factors:
        """The sum over all uses."""
        part = self._parts.pop(torch._C._current_graph_task_id(), None)
        if part is None:
            raise AssertionError("a use's backward runs before the tap's")
        return part


def as_dense(gradient: Tensor | Factors) -> Tensor:
    """A whole gradient as a dense tensor."""
    if isinstance(gradient, Factors):
        return gradient.dense()
    return gradient.to_dense() if gradient.is_sparse else gradient


def gradient_at(gradient: Tensor | Factors, entries: Entries) -> Tensor:
    """A whole gradient's entries: (m,)."""
    return gradient.at(entries) if isinstance(gradient, Factors) else take_gradient(gradient, entries)


def add(a: Tensor | Factors, b: Tensor | Factors) -> Tensor:
    """The sum of two gradients: dense, unless both are sparse in rows."""
    a, b = (part.dense() if isinstance(part, Factors) else part for part in (a, b))
    if a.is_sparse:
        a, b = b, a
    total = a + b
    return total.coalesce() if total.is_sparse else total


def _norms(x: Tensor) -> Tensor:
    """Of each column: (columns,) float32, float64 for float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = torch.zeros(x.shape[1], dtype=wide, device=x.device)
    for piece in x.split(NORMS if x.device.type == "cpu" else max(1, x.shape[0])):
        total += piece.to(wide).square().sum(0)
    return total.sqrt_()


class _Last(threading.local):
    def __init__(self) -> None:
        self.key: tuple | None = None
        self.of: Tensor | None = None  # held, so that its address stays its own
        self.norms: Tensor | None = None


_last = _Last()


def _shared_norms(x: Tensor) -> Tensor:
    """Norms of an input that the next product may use as well: query, key and value share theirs."""
    key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x._version)
    if _last.norms is None or _last.key != key:
        _last.key, _last.of, _last.norms = key, x, _norms(x)
    return _last.norms


def forget() -> None:
    """A backward is over: lets go of its activations."""
    _last.key = _last.of = _last.norms = None
    sampled.forget()
