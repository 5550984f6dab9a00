"""Says how the engine computes on a device: the one seam between what is computed and how.

There are three backends. The *CPU* asks how much there is to do before it does it: how many rows hold entries, which gradients
can reach the least score. The *CUDA* backend never asks, for each answer would make the host wait for the device. It does work
of a size that the host knows, and has a Triton kernel for sampled products. The *portable* backend takes the same path as CUDA,
in plain operations of torch, on any device: on GPUs without Triton; and on a CPU, where tests and ``unmask bench --host`` run it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.gradients import triton_sampled

_CHUNK = 1 << 22  # The scalars of one gathered operand of `gathered_product`.


@dataclass(frozen=True)
class Backend:
    """The way in which the engine computes on a kind of device.

    Attributes:
        name: ``"cpu"``, ``"cuda"`` or ``"portable"``.
        asks: True if the host may ask for sizes that depend on data; where it is False, no operation may wait for the device.
        sampled: Computes ``(g^T x)[rows, columns]`` of g (T, rows), x (T, columns) and the (m,) int64 rows and columns of the
            entries, as (m,) float32; None on the CPU, whose product `unmask.gradients.sampled` holds.
    """

    name: str
    asks: bool
    sampled: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


def gathered_product(g: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Computes ``(g^T x)[rows, columns]`` by gathering columns of both: (m,) float32, float64 for float64.

    Example:
        >>> g, x, at = torch.ones(3, 2), torch.ones(3, 4), torch.tensor([1])
        >>> gathered_product(g, x, at, at).tolist()
        [3.0]
    """
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    size = max(1, _CHUNK // max(1, g.shape[0]))
    if rows.numel() > size:
        pieces = zip(rows.split(size), columns.split(size), strict=True)
        return torch.cat([gathered_product(g, x, *piece) for piece in pieces])
    left, right = g.index_select(1, rows), x.index_select(1, columns)
    if g.dtype != wide:
        left, right = left.to(wide), right.to(wide)
    return (left * right).sum(0)


_CPU = Backend("cpu", asks=True)
_CUDA = Backend("cuda", asks=False, sampled=triton_sampled.triton_sampled_product)
_PORTABLE = Backend("portable", asks=False, sampled=gathered_product)
_everywhere = False  # True inside `portable`


def backend_of(device: torch.device) -> Backend:
    """Returns the backend of a device.

    Example:
        >>> backend_of(torch.device("cpu")).name
        'cpu'
        >>> with portable():
        ...     backend_of(torch.device("cpu")).name
        'portable'
    """
    if _everywhere:
        return _PORTABLE
    if device.type == "cpu":
        return _CPU
    return _CUDA if triton_sampled.available(device) else _PORTABLE


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Makes every device, the CPU too, use the portable backend inside the ``with`` block; all of a run must be inside."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before
