"""Measures how scores, or selections, move in the course of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from unmask.analysis.measures import Source, overlap
from unmask.errors import MethodError, need


@dataclass(frozen=True)
class Drift:
    """The distance between the scores of two moments.

    Attributes:
        earlier: The number of the moment (from 0) that is compared with.
        later: The number of the moment that is compared.
        rank_correlation: Spearman's rank correlation over all weights, -1 to 1; NaN if one moment's scores are all equal.
        top_overlap: The share of the earlier top k that is in the later top k, 0 to 1.
        expected: The ``top_overlap`` that chance would give, k / N.
    """

    earlier: int
    later: int
    rank_correlation: float
    top_overlap: float
    expected: float


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Returns Spearman's rank correlation of two tensors, with ties at their mean rank; NaN if one tensor is constant.

    Args:
        a: A tensor of any shape and dtype, with at least two entries.
        b: A tensor with as many entries.

    Raises:
        MethodError: The counts differ, there are fewer than two entries, or one is NaN.
        MissingExtraError: SciPy is not installed.

    Example:
        >>> round(rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 9.0, 4.0])), 6)
        0.5
    """
    if a.numel() != b.numel() or a.numel() < 2:
        raise MethodError(f"{a.numel()} and {b.numel()} scores; give two or more of each, and as many of both.")
    if a.isnan().any() or b.isnan().any():
        raise MethodError("a score is NaN; there is no rank for it.")
    flat = [t.detach().reshape(-1).cpu() for t in (a, b)]
    x, y = ((t.double() if t.is_floating_point() else t).numpy() for t in flat)  # NumPy has no bfloat16
    if (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    return float(need("scipy.stats", "eval").spearmanr(x, y).statistic)


def drift(scores: Sequence[Mapping[str, Tensor]], k: int, against: str = "previous") -> list[Drift]:
    """Measures how scores move over snapshots: the rank correlation, and how many of the top k stay.

    Args:
        scores: Two or more snapshots: a score (or a gradient's magnitude) per weight by tensor name, with equal shapes.
        k: The size of the top, e.g. the budget. Ties go to tensor name order, then to the lower flat index.
        against: ``"previous"`` compares each snapshot with the one before, ``"first"`` with the first one.

    Raises:
        MethodError: There are fewer than two snapshots, one has other tensors, ``k`` is outside 1..N, or a score is NaN.
        MissingExtraError: SciPy is not installed.

    Example:
        >>> drift([{"w": torch.tensor([3.0, 2.0, 1.0])}, {"w": torch.tensor([3.0, 1.0, 2.0])}], k=2)[0]
        Drift(earlier=0, later=1, rank_correlation=0.5, top_overlap=0.5, expected=0.6666666666666666)
    """
    if len(scores) < 2:
        raise MethodError(f"{len(scores)} snapshots of scores; give two or more.")
    shapes = {name: tensor.shape for name, tensor in scores[0].items()}
    for i, snapshot in enumerate(scores):
        if {name: tensor.shape for name, tensor in snapshot.items()} != shapes:
            raise MethodError(f"snapshot {i} holds other tensors or shapes than snapshot 0; take all on one model.")
    if against not in ("previous", "first"):
        raise MethodError(f"against = {against!r}; it must be 'previous' or 'first'.")
    rows = [torch.cat([snapshot[name].detach().reshape(-1).cpu() for name in sorted(shapes)]) for snapshot in scores]
    total = rows[0].numel()
    if not 1 <= k <= total:
        raise MethodError(f"k = {k}; there are {total:,} scores, so it must be from 1 to {total}.")
    tops = [row.sort(descending=True, stable=True).indices[:k] for row in rows]
    result = []
    for later in range(1, len(rows)):
        earlier = later - 1 if against == "previous" else 0
        stayed = int(torch.isin(tops[earlier], tops[later], assume_unique=True).sum())
        correlation = rank_correlation(rows[earlier], rows[later])
        result.append(Drift(earlier, later, correlation, stayed / k, k / total))
    return result


def turnover(masks: Sequence[Source]) -> list[float]:
    """Returns the share of each mask that is gone in the next one, 0 to 1. For increment-S it is always 0.

    Args:
        masks: Two or more masks, in the order of the run (`mask_of` a selection freezes its mask of that moment).

    Raises:
        MethodError: There are fewer than two masks.

    Example:
        >>> from unmask.analysis import mask_over
        >>> turnover([mask_over({"w": torch.tensor(flat)}, {"w": (8,)}) for flat in ([0, 1], [1, 2], [1, 2, 3])])
        [0.5, 0.0]
    """
    if len(masks) < 2:
        raise MethodError(f"{len(masks)} masks; give two or more.")
    return [1 - overlap(a, b).of_a for a, b in pairwise(masks)]
