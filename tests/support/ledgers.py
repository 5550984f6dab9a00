"""Makes ledgers of a few tensors, gradients for them, and rankings of these, for the tests of several rankers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from unmask.methods.heuristics import Heuristic, heuristic
from unmask.ranking.ledger import Layout, Ledger
from unmask.ranking.ranker import Ranking
from unmask.ranking.topk import Ranked

SHAPES = [(7, 5), (40,), (1, 9), (3, 2, 4), (), (0, 4), (16, 16)]
HEURISTICS = [
    heuristic("d3"), heuristic("d3", exp=0.0), heuristic("d3", exp=-1.0, eps=0.5), heuristic("gradient"), heuristic("snip"),
    heuristic("small_magnitude"), heuristic("large_magnitude"), heuristic("constant"), heuristic("random", seed=3),
]  # fmt: skip


def a_ledger(
    dtype: torch.dtype = torch.float32, held: Sequence[int] = (3, 20, 36, 77, 90), coarse: bool = False
) -> Ledger:
    """Makes a ledger of a few tensors, some of whose weights are unmasked; coarse numbers make many equal scores."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    if coarse:
        tensors = [t.round() for t in tensors]
    layout = Layout([f"t{i}" for i in range(len(SHAPES))], [t.to(dtype) for t in tensors])
    ledger = Ledger(layout, torch.nn.Parameter(torch.zeros(30)), 30)
    if held:
        positions = torch.tensor(held)
        ledger.assign(torch.arange(len(held)), positions, layout.read(positions, torch.float32))
    return ledger


def some_gradients(ledger: Ledger, coarse: bool = False) -> list[Tensor]:
    """Makes a gradient for each tensor of `a_ledger`, in the tensor's dtype."""
    generator = torch.Generator().manual_seed(2)
    found = [torch.randn(t.shape, generator=generator) for t in ledger.layout.tensors]
    found = [g.mul(2).round() if coarse else g for g in found]
    return [g.to(t.dtype) for g, t in zip(found, ledger.layout.tensors, strict=True)]


def ranked_by(
    ranker: Ranking, gradients: Sequence[Tensor] | None, order: Iterable[int], unreached: Iterable[int] = ()
) -> Ranked:
    """Offers the tensors to a ranker in an order, those that the loss did not reach by `Ranking.rank_zero`."""
    for index in order:
        if index in unreached:
            ranker.rank_zero(index)
        else:
            ranker.rank(index, None if gradients is None else gradients[index])
    return ranker.result()


def densely(
    by: Heuristic, ledger: Ledger, gradients: Sequence[Tensor] | None, keep: int, step: int, exclude_members: bool
) -> Ranked:
    """Ranks by one sort of the scores of all entries at once: the dense reference on the CPU."""
    scores = torch.cat(
        [
            by.score(weight, None if gradients is None else gradients[index], (step, index, 0)).reshape(-1).float()
            for index, weight in enumerate(ledger.layout.tensors)
        ]
    )
    payload = scores if gradients is None else torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    competes = scores > by.floor
    if exclude_members:
        competes[ledger.positions[ledger.positions >= 0]] = False
    order = scores.argsort(descending=True, stable=True)
    order = order[competes[order]][:keep]
    return Ranked(scores[order], order, payload[order])
