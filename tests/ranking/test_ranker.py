"""Compares the ranking of many tensors with one plain sort of all scores, for every form in which a gradient comes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unmask.methods.heuristics import heuristic
from unmask.ranking import ranker as module
from unmask.ranking.ledger import Layout, Ledger
from unmask.ranking.ranker import Ranker

SHAPES = [(16, 12), (1, 50), (40, 6), (30,), (7, 9)]
HELD = torch.arange(0, 500, 7)
GRADIENTS = {
    "plain": lambda g: g,
    "transposed": lambda g: g.t().contiguous().t() if g.ndim == 2 else g,
    "rows": lambda g: g.to_sparse(1).coalesce() if g.ndim == 2 else g,
}


def numbers(kind: str, generator: torch.Generator) -> list[Tensor]:
    """Draws gradients with many ties, with negative ones where they are large, or with whole rows of zeros."""
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    if kind == "ties":
        return [g.mul(2).round() for g in drawn]
    if kind == "negative":
        return [torch.where(g.abs() > 1, -g.abs(), g) for g in drawn]
    return [g * (torch.rand(g.shape[0], *[1] * (g.ndim - 1), generator=generator) < 0.3) for g in drawn]


def plain_ranking(layout: Layout, name: str, gradients: list[Tensor], keep: int) -> list[int]:
    """Returns positions by score descending, then position ascending, without those that are held or score too little."""
    of = heuristic(name)
    scores = torch.cat([of.score(w.detach(), g).reshape(-1) for w, g in zip(layout.tensors, gradients, strict=True)])
    held = set(HELD.tolist())
    ranked = sorted((-s, i) for i, s in enumerate(scores.tolist()) if i not in held and s > of.floor)
    return [position for _, position in ranked[:keep]]


@pytest.mark.parametrize("form", GRADIENTS)
@pytest.mark.parametrize("kind", ["ties", "negative", "zeros"])
@pytest.mark.parametrize("name", ["gradient", "d3", "snip", "small_magnitude"])
def test_the_ranking_is_that_of_one_plain_sort(name, kind, form, monkeypatch):
    monkeypatch.setattr(module, "GLANCE", 32)
    monkeypatch.setattr(module, "BLOCK", 32)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    layout = Layout([f"w{i}" for i in range(len(SHAPES))], [nn.Parameter(w) for w in weights])
    for keep in (1, 9, 60, 1000):
        gradients = numbers(kind, generator)
        ledger = Ledger(layout, nn.Parameter(torch.zeros(200, dtype=torch.float64)), 200)
        ledger.assign(torch.arange(HELD.numel()), HELD, torch.zeros(HELD.numel(), dtype=torch.float64))
        ranker = Ranker(heuristic(name), ledger, "global", keep, 0, exclude_members=True)
        for index in (3, 0, 4, 1, 2):
            ranker.rank(index, GRADIENTS[form](gradients[index]))
        result = ranker.result()
        assert result.positions.tolist() == plain_ranking(layout, name, gradients, keep)
        flat = torch.cat([g.reshape(-1) for g in gradients])
        assert torch.equal(result.payload, flat[result.positions])


@pytest.mark.parametrize("name", ["gradient", "small_magnitude"])
def test_a_tensor_that_the_loss_did_not_reach_takes_part_as_one_of_gradient_zero(name):
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    layout = Layout([f"w{i}" for i in range(len(SHAPES))], [nn.Parameter(w) for w in weights])
    gradients = [torch.zeros_like(w) if i == 2 else torch.randn_like(w) for i, w in enumerate(weights)]
    ledger = Ledger(layout, nn.Parameter(torch.zeros(200, dtype=torch.float64)), 200)
    ledger.assign(torch.arange(HELD.numel()), HELD, torch.zeros(HELD.numel(), dtype=torch.float64))
    ranker = Ranker(heuristic(name), ledger, "global", 400, 0, exclude_members=True)
    for index in (0, 1, 3, 4):
        ranker.rank(index, gradients[index])
    ranker.rank_zero(2)
    assert ranker.result().positions.tolist() == plain_ranking(layout, name, gradients, 400)


def test_an_entry_whose_computed_score_exceeds_its_bound_by_rounding_is_not_lost():
    """Takes |w g|, which rounds in float32, while the bound max |w| times |g| does not."""
    of = heuristic("snip")
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        weight = torch.rand(1, generator=generator).expand(4, 2).contiguous()
        gradient = torch.rand(1, generator=generator).expand(4, 2).contiguous()
        ledger = Ledger(Layout(["w"], [nn.Parameter(weight)]), nn.Parameter(torch.zeros(8)), 8)
        ranker = Ranker(of, ledger, "global", 8, 0, exclude_members=True)
        scores = of.score(weight, gradient).reshape(-1)
        ranker.top.update(scores, 1000, torch.ones(8))
        ranker.rank(0, gradient)  # Its entries tie with those that are in, at smaller positions.
        assert ranker.result().positions.tolist() == list(range(8))
