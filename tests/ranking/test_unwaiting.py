"""The ranking that never waits, against the one that does, and the operations that would make the host wait."""

from __future__ import annotations

import math

import pytest
import torch
from ledgers import HEURISTICS, SHAPES, a_ledger, ranked_by, some_gradients

from unmask.errors import NonFiniteGradientError
from unmask.gradients.factors import Factors
from unmask.lab.bench.host import Operations
from unmask.methods.heuristics import heuristic
from unmask.ranking import unwaiting
from unmask.ranking.ranker import Ranker
from unmask.ranking.unwaiting import UnwaitingRanker, first_places


@pytest.mark.parametrize(("block", "small"), [(1, 1), (16, 1), (1 << 24, 60), (16, 60), (1 << 24, 1 << 22)])
@pytest.mark.parametrize("keep", [0, 1, 9, 64, 1000])
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("by", HEURISTICS, ids=lambda h: f"{h.name}-{dict(h.parameters)}")
def test_the_entries_are_those_of_the_other_ranking(by, coarse, keep, block, small, monkeypatch):
    monkeypatch.setattr(unwaiting, "BLOCK", block)
    monkeypatch.setattr(unwaiting, "_SMALL", small)
    monkeypatch.setattr(unwaiting, "_MERGE", 50)  # several merges
    ledger = a_ledger(coarse=coarse)
    gradients = some_gradients(ledger, coarse) if by.needs == "gradient" else None
    order = torch.randperm(len(SHAPES), generator=torch.Generator().manual_seed(keep)).tolist()
    expected = ranked_by(Ranker(by, ledger, "global", keep, 4, True), gradients, order, {2, 6})
    found = ranked_by(UnwaitingRanker(by, ledger, keep, 4, True), gradients, order, {2, 6})
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_transposed_gradients_and_factors(dtype):
    ledger = a_ledger(dtype, held=())
    gradients = some_gradients(ledger)
    given = [g.t().contiguous().t() if g.ndim == 2 else g for g in gradients]
    left, right = torch.randn(3, 16).to(dtype), torch.randn(3, 16).to(dtype)
    gradients[6], given[6] = Factors(left, right, dtype).dense(), Factors(left, right, dtype)
    expected = ranked_by(Ranker(heuristic("d3"), ledger, "global", 20, 0, False), gradients, range(7))
    found = ranked_by(UnwaitingRanker(heuristic("d3"), ledger, 20, 0, False), given, range(7))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("small", [1, 1 << 22])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_with_its_tensor(value, small, monkeypatch):
    monkeypatch.setattr(unwaiting, "_SMALL", small)
    ledger = a_ledger()
    gradients = some_gradients(ledger)
    gradients[3][1, 1, 2] = value
    with pytest.raises(NonFiniteGradientError, match=r"a score of 't3' is (nan|inf)"):
        ranked_by(UnwaitingRanker(heuristic("d3"), ledger, 9, 0, True), gradients, range(7))


def test_nothing_offered_gives_nothing():
    assert UnwaitingRanker(heuristic("d3"), a_ledger(), 9, 0, True).result().positions.tolist() == []


@pytest.mark.parametrize("k", [0, 1, 5, 11, 12])
def test_first_places_take_the_first_of_equal_scores(k):
    scores = torch.tensor([1.0, 3.0, -torch.inf, 2.0, 2.0, 3.0, 0.0, 2.0, 1.0, -torch.inf, 2.0, -1.0])
    order = sorted(range(12), key=lambda place: (-scores[place].item(), place))
    assert first_places(scores, k).tolist() == sorted(order[:k])


def test_no_operation_of_a_ranking_waits():
    ledger = a_ledger()
    gradients = some_gradients(ledger)
    ranker = UnwaitingRanker(heuristic("d3"), ledger, 9, 0, True)
    with Operations() as operations:
        for index in range(7):
            ranker.rank(index, gradients[index])
        assert operations.waiting.total() == 0
        ranker.result()
    assert operations.waiting == {"tolist": 1}
