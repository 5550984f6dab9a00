"""Tensors compared bit for bit: NaN equals itself, and -0.0 is not 0.0."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.fingerprint import digest

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_entries(left: Tensor, right: Tensor) -> Tensor:
    """Which entries of two tensors of one shape and real dtype have the same bits: bool, of that shape.

    Example:
        >>> same_entries(torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, -0.0])).tolist()
        [True, False]
    """
    integer = _INTEGERS[left.element_size()]
    return left.contiguous().view(integer) == right.contiguous().view(integer)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; the second may be on another device.

    Example:
        >>> same_bits(torch.tensor(torch.nan), torch.tensor(torch.nan)), same_bits(torch.zeros(1), torch.zeros(1).neg())
        (True, False)
    """
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if any(type(t) is not Tensor or t.layout != torch.strided or t.is_complex() for t in (left, right)):
        return digest(left) == digest(right)
    return bool(same_entries(left, right.to(left.device)).all())
