"""The LIFT heuristic of the study, as an example of a heuristic of your own that looks at whole tensors.

LIFT (arXiv 2506.00772) trains the largest entries of each weight matrix's best approximation of a low rank. It was a part
of unmask until the study (docs/results.md), in which a random mask over the same layers had less loss. This file gives it
back to a script that imports it:

    import sys
    sys.path.insert(0, "experiments")
    import lift

    method = lift.method(budget="0.2%", rank=128)

Example:
    >>> import unmask
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> selection = unmask.select(model, method(budget=1, rank=1))
    >>> selection.indices
    {'weight': tensor([0])}
"""

from __future__ import annotations

import torch
from torch import Tensor

import unmask

EXACT = 1024  # the shorter side up to which the approximation is exact
_BLOCK = 1 << 20  # entries turned to float64 at a time
_OVERSAMPLE, _ROUNDS = 16, 4


def score(weight: Tensor, gradient: Tensor | None, rank: int = 128) -> Tensor:
    """Computes ``|W_r|``, where W_r is the best approximation of rank r to the weight matrix.

    A vector, or a matrix of no higher rank, is its own approximation. A tensor of more dimensions is taken as a matrix: its
    first dimension by the rest.

    Args:
        weight: Any shape, float32 or float64.
        gradient: It is not used.
        rank: At least 1.

    Returns:
        Scores of the weight's shape and dtype.

    Example:
        >>> score(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), None, rank=1).round(decimals=5).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    if weight.ndim < 2 or min(weight.shape) == 0:
        return weight.abs()
    return low_rank(weight.reshape(weight.shape[0], -1), rank).abs().view(weight.shape)


def method(budget: int | str, rank: int = 128) -> unmask.Method:
    """Builds the static method: each linear layer has its share of the budget, for its weights of the largest score.

    Args:
        budget: B, a count or a share.
        rank: The rank of the approximation; the authors' code recommends 128, for models of width 2,048 and more.

    Raises:
        unmask.MethodError: The rank is not a whole number of at least 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise unmask.MethodError(f"rank = {rank!r}; it must be a whole number, at least 1.")
    heuristic = unmask.heuristic(HEURISTIC, rank=rank)
    return unmask.Method("lift", budget, heuristic, "static", scope=unmask.Scope("linear"), allocation="tensor")


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """Computes the best approximation of a rank in the least squares sense: the sum of the first ``rank`` singular triplets.

    Args:
        matrix: (rows, columns), float32 or float64.
        rank: At least 1; from the shorter side on the matrix itself comes back.

    Returns:
        A matrix of the same shape and dtype. Where the shorter side is above `EXACT` it is nearly the best: it comes from a
        block power iteration of 4 rounds that has a fixed random start, so it is the same on every call.

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
    """Computes the first right singular vectors in float64, as eigenvectors of the Gram matrix."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in tall.split(max(1, _BLOCK // tall.shape[1])):
        wide = rows.double()
        gram.addmm_(wide.t(), wide)
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:]


def _leading_nearly(tall: Tensor, rank: int) -> Tensor:
    """Computes nearly those vectors, by random projections."""
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same on every device
    width = min(tall.shape[1], rank + _OVERSAMPLE)
    basis = torch.randn(tall.shape[1], width, generator=generator, dtype=tall.dtype).to(tall.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(tall.t() @ torch.linalg.qr(tall @ basis).Q).Q
    return basis @ _leading(tall @ basis, rank).to(tall.dtype)


# A score of one entry depends on the whole matrix, so the heuristic is not elementwise.
HEURISTIC = unmask.register_heuristic("lift", score, needs="weight", elementwise=False)
