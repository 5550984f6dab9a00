"""A matrix's best approximation of a rank, deterministically: exact for small matrices, by random projections for large ones."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1024  # the shorter side up to which the approximation is exact
_BLOCK = 1 << 20  # entries turned to float64 at a time
_OVERSAMPLE, _ROUNDS = 16, 4


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank in the least squares sense: ``sum of the first rank singular triplets``.

    Args:
        matrix: (rows, columns), float32 or float64.
        rank: At least 1; from the shorter side on the matrix itself comes back.

    Returns:
        Of the matrix's shape and dtype. Above a shorter side of `EXACT` nearly the best: a block power iteration of 4 rounds
        from a fixed random start, the same on every call.

    Source: Eckart and Young, 1936; Halko, Martinsson and Tropp, algorithm 4.4 (arXiv 0909.4061).

    Example:
        >>> low_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1).round(decimals=5).abs().tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    shorter = min(matrix.shape)
    if rank >= shorter:
        return matrix
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    basis = _leading(tall, rank) if shorter <= EXACT else _leading_nearly(tall, rank)  # (shorter, rank), orthonormal
    basis = basis.to(matrix.dtype)
    close = (tall @ basis) @ basis.t()
    return close if tall is matrix else close.t()


def _leading(tall: Tensor, rank: int) -> Tensor:
    """The first right singular vectors, as eigenvectors of the Gram matrix, in float64."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in tall.split(max(1, _BLOCK // tall.shape[1])):
        wide = rows.double()
        gram.addmm_(wide.t(), wide)
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:]


def _leading_nearly(tall: Tensor, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same on every device
    width = min(tall.shape[1], rank + _OVERSAMPLE)
    basis = torch.randn(tall.shape[1], width, generator=generator, dtype=tall.dtype).to(tall.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(tall.t() @ torch.linalg.qr(tall @ basis).Q).Q
    return basis @ _leading(tall @ basis, rank).to(tall.dtype)
