"""Checks the caps on tensors, rows and columns, and LIFT, the example of a heuristic over whole tensors."""

from __future__ import annotations

import importlib.util
import math
from contextlib import nullcontext

import pytest
import torch
from helpers import ROOT, as_lists, batches, dense_gradients, first_k, mlp, train
from torch import nn

import unmask
from unmask import MethodError, UnmaskWarning
from unmask.ranking import ranker as streamed


def net():
    """Makes a model whose first layer has two rows and two columns of large gradients; no loss reaches one tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4), nn.LayerNorm(4))
    with torch.no_grad():
        model[3].weight[:, :2] *= 30
    model.register_parameter("unused", nn.Parameter(torch.randn(5, 3)))
    return model


def inputs(count=1):
    data = batches(count, size=8, width=12)
    for x in data:
        x[:, :2] *= 30
    return data


def target(model, x):
    return (model(x) - x[:, :4]).square().mean()


def scores_of(model, score, x):
    gradients = dense_gradients(model, lambda m: target(m, x))
    return {name: score(p.detach(), gradients[name]) for name, p in model.named_parameters()}


SCORES = {
    "d3": lambda w, g: g.abs() / (w.abs() + 1) ** 2,
    "gradient": lambda w, g: g.abs(),
    "snip": lambda w, g: (g * w).abs(),
}


def greedy(scores, k, group):
    """Takes entries by score, if it is above 0 and their group has room; ``group(name, flat)`` is its key and its cap."""
    entries = [(-s, n, i) for n in sorted(scores) for i, s in enumerate(scores[n].reshape(-1).tolist())]
    chosen, filled = {}, {}
    for score, name, i in sorted(entries):
        key, cap = group(name, i)
        if k and score < 0 and filled.get(key, 0) < cap:
            filled[key] = filled.get(key, 0) + 1
            chosen.setdefault(name, []).append(i)
            k -= 1
    return {name: sorted(flat) for name, flat in chosen.items()}


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("allocation", ["tensor", "row", "column"])
def test_caps_under_one_ranking(allocation, name, block, monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK", block)
    model, x, budget = net(), inputs()[0], 45
    shapes = {n: p.shape for n, p in model.named_parameters()}
    total = sum(s.numel() for s in shapes.values())

    def group(name, i):
        shape = shapes[name]
        alike = len(shape) < 2 or allocation == "tensor"
        size = shape.numel() if alike else shape[1] if allocation == "row" else shape[0]
        place = 0 if alike else i // shape[1] if allocation == "row" else i % shape[1]
        return (name, place), math.ceil(budget * size / total)

    expected = greedy(scores_of(model, SCORES[name], x), budget, group)
    method = unmask.static_d3(budget).but(allocation=allocation, heuristic=unmask.heuristic(name))
    selection = unmask.select(model, method)
    # The loss does not reach one tensor, whose share is not selected.
    short = sum(map(len, expected.values())) < budget
    with (
        pytest.warns(UnmaskWarning, match=rf"selected {sum(map(len, expected.values()))}\b") if short else nullcontext()
    ):
        train(model, torch.optim.SGD(selection.parameters(), lr=0.0), [x], target)
    assert as_lists(selection.indices) == expected


@pytest.mark.parametrize("allocation", ["tensor", "row", "column"])
@pytest.mark.parametrize("heuristic", ["random", "d3", "small_magnitude"])
@pytest.mark.parametrize("strategy", ["increment", "repeat"])
def test_caps_hold_while_the_selection_grows_or_is_exchanged(strategy, heuristic, allocation):
    torch.manual_seed(0)
    model = mlp()
    parts = {"heuristic": unmask.heuristic(heuristic), "allocation": allocation, "scope": unmask.Scope("linear")}
    selection = unmask.select(model, unmask.id3(40, steps=12, stride=3).but(strategy=strategy, **parts))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05, weight_decay=0.1)
    size = 36 if allocation == "tensor" else 6
    for t, x in enumerate(batches(12)):
        train(model, optimizer, [x])
        assert selection.used == selection.method.cumulative(t, 40)
        for flat in selection.indices.values():
            group = {"tensor": flat * 0, "row": flat // 6, "column": flat % 6}[allocation]
            assert torch.bincount(group).max() <= math.ceil(40 * size / 108)


@pytest.mark.parametrize(
    "build",
    [
        lambda: unmask.pafi(3).but(allocation="row-column"),
        lambda: unmask.sparse_adapter(3, "synflow").but(allocation="row"),
        lambda: unmask.select(mlp(), unmask.id3(3, steps=2).but(allocation="row"), exchange="candidates"),
    ],
)
def test_an_allocation_that_cannot_work_is_refused(build):
    with pytest.raises(MethodError, match="allocation"):
        build()


# LIFT, the example in experiments/lift.py.


@pytest.fixture
def lift(registry):
    """Loads the example, whose heuristic is registered for this test alone."""
    path = ROOT / "experiments" / "lift.py"
    spec = importlib.util.spec_from_file_location("lift_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_svd(matrix, rank):
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("shape", [(7, 7), (40, 9), (9, 40)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_low_rank_approximation_is_the_truncated_svd(lift, shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lift.low_rank(matrix, rank).double(), by_svd(matrix, rank), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)])
def test_the_approximation_of_a_large_matrix_is_nearly_the_truncated_svd_and_is_deterministic(lift, shape, monkeypatch):
    monkeypatch.setattr(lift, "EXACT", 8)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 50, generator=generator)).Q for n in shape)
    matrix = (u * 0.8 ** torch.arange(50)) @ v.t()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = lift.low_rank(matrix, 6), lift.low_rank(matrix, 6)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    best = by_svd(matrix, 6)
    assert (matrix - first).norm() <= 1.001 * (matrix - best).norm()
    assert (first - best).norm() <= 1e-2 * best.norm()


def test_lift_takes_each_linear_layers_share_by_its_approximation(lift):
    model = net()
    weights = {n: p.detach() for n, p in model.named_parameters() if n in ("1.weight", "3.weight")}
    scores = {n: by_svd(w, 2).abs() for n, w in weights.items()}
    selection = unmask.select(model, lift.method(50, rank=2))
    caps = {n: math.ceil(50 * w.numel() / 160) for n, w in weights.items()}
    assert as_lists(selection.indices) == greedy(scores, 50, lambda name, i: (name, caps[name]))
    assert as_lists(selection.indices) != greedy(
        {n: w.abs() for n, w in weights.items()}, 50, lambda n, i: (n, caps[n])
    )


def test_lift_of_every_kind_of_tensor(lift):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv1d(4, 3, 5), nn.LayerNorm(6), nn.Linear(2, 30)])
    selection = unmask.select(model, unmask.Method("all", 60, unmask.heuristic("lift", rank=2), "static"))
    scores = {n: p.detach().abs() for n, p in model.named_parameters()}
    scores["0.weight"] = by_svd(model[0].weight.detach().view(3, -1), 2).abs()
    assert as_lists(selection.indices) == first_k(scores, 60)


def test_lift_refreshed_ranks_the_trained_weights(lift):
    model = net()
    method = lift.method(20, rank=2).but(
        strategy="repeat", schedule=unmask.Schedule.of("uniform", 1, stride=2), allocation="global"
    )
    selection = unmask.select(model, method)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.3)
    for t, x in enumerate(inputs(3)):
        if t == 2:
            trained = {n: by_svd(model.get_parameter(n).detach(), 2).abs() for n in ("1.weight", "3.weight")}
        train(model, optimizer, [x], target)
    assert as_lists(selection.indices) == first_k(trained, 20)
    assert selection.used == 20


@pytest.mark.parametrize("rank", [0, 2.5, True])
def test_lift_refuses_a_rank_that_is_no_whole_number_from_1_on(lift, rank):
    with pytest.raises(MethodError, match="rank = "):
        lift.method(3, rank=rank)
