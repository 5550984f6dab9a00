"""Selections that spread: caps on rows and columns, scores against the means of their row and column, LIFT."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import unmask
from helpers import as_lists, batches, dense_gradients, first_k, mean_square, mlp, train
from unmask import MethodError, UnmaskWarning
from unmask.gradients import streamed
from unmask.lowrank import low_rank

LAYERS = [1, 3]  # of `net`


def net():
    """Two rows and two columns of the first layer have gradients far above the rest; one tensor is never reached."""
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


def scores_of(model, score, x, normalise="none"):
    gradients = dense_gradients(model, lambda m: target(m, x))
    plain = {name: score(p.detach(), gradients[name]) for name, p in model.named_parameters()}
    return {name: normalised(s, normalise) for name, s in plain.items()}


def normalised(s, how):
    """By the formulas of docs/methods.md, entry by entry."""
    if how == "none":
        return s
    mean = s.abs().double().mean()
    if not mean:
        return s
    if s.ndim < 2:
        return (s / mean).float()
    row, column = s.abs().double().mean(1), s.abs().double().mean(0)
    out = torch.zeros_like(s)
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            if row[i] and column[j]:
                product = row[i] * column[j]
                out[i, j] = s[i, j] * mean / product if how == "row-column" else s[i, j] / product.sqrt()
    return out


SCORES = {
    "d3": lambda w, g: g.abs() / (w.abs() + 1) ** 2,
    "gradient": lambda w, g: g.abs(),
    "snip": lambda w, g: (g * w).abs(),
    "magnitude": lambda w, g: -w.abs(),
    "large_magnitude": lambda w, g: w.abs(),
}


@pytest.mark.parametrize("block", [1, 13, 1 << 20])
@pytest.mark.parametrize("gradients", ["auto", "dense"])
@pytest.mark.parametrize("how", ["row-column", "row-column-root"])
@pytest.mark.parametrize("name", SCORES)
def test_normalised_scores_rank_as_their_formula(name, how, gradients, block, monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK", block)
    model, x = net(), inputs()[0]
    expected = scores_of(model, SCORES[name], x, how)
    method = unmask.static_d3(40).but(heuristic=unmask.heuristic(name), normalise=how)
    selection = unmask.select(model, method, gradients=gradients)
    train(model, torch.optim.SGD(selection.parameters(), lr=0.0), [x], target)
    assert as_lists(selection.indices) == first_k(expected, 40)


def most(selection, axis):
    flat = selection.indices["1.weight"]
    return int(torch.bincount(flat // 12 if axis else flat % 12).max())


@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
def test_normalised_scores_do_not_pile_up(axis):
    counts = {}
    for how in ("none", "row-column-root", "row-column"):
        model = net()
        method = unmask.static_d3(30, exp=0.0).but(normalise=how)
        selection = unmask.select(model, method, include=r"1\.weight")
        train(model, torch.optim.SGD(selection.parameters(), lr=0.0), inputs(), target)
        counts[how] = most(selection, axis)
    assert counts["row-column"] < counts["none"]
    assert counts["row-column"] <= counts["row-column-root"] <= counts["none"]


def test_a_rank_one_tensor_scores_alike_whatever_its_rows_and_columns(registry):
    """So the order is that of ties: tensor names, flat indices."""
    outer = unmask.register_heuristic("outer", lambda w, g: w.abs())
    model = nn.ParameterDict(
        {"a": torch.tensor([[1.0], [8.0], [64.0]]) * torch.tensor([1.0, 4.0]), "b": torch.ones(2, 2)}
    )
    method = unmask.Method("m", 7, outer, "repeat", normalise="row-column")
    selection = unmask.select(model, method)
    sum(p.sum() for p in model.values()).backward()
    torch.optim.SGD(selection.parameters(), lr=0.0).step()
    assert as_lists(selection.indices) == {"a": [0, 1, 2, 3, 4, 5], "b": [0]}


def test_micro_batches_are_ranked_by_their_sum_where_the_gradients_are_kept():
    model, (x, y) = net(), inputs(2)
    gradients = dense_gradients(model, lambda m: target(m, x) + target(m, y))
    expected = {n: normalised(g.abs(), "row-column") for n, g in gradients.items()}
    method = unmask.static_d3(25, exp=0.0).but(normalise="row-column")
    selection = unmask.select(model, method, accumulation="exact")
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.0)
    for batch in (x, y):
        target(model, batch).backward()
    optimizer.step()
    assert as_lists(selection.indices) == first_k(expected, 25)


def greedy(scores, k, group):
    """In order of score, if it is above 0 and the group has room: ``group(name, flat) -> (key, cap)``."""
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
@pytest.mark.parametrize("how", ["none", "row-column"])
@pytest.mark.parametrize("allocation", ["tensor", "row", "column"])
def test_caps_under_one_ranking(allocation, how, block, monkeypatch):
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

    expected = greedy(scores_of(model, SCORES["d3"], x, how), budget, group)
    method = unmask.static_d3(budget).but(allocation=allocation, normalise=how)
    selection = unmask.select(model, method)
    short = sum(map(len, expected.values())) < budget  # a tensor's share that the loss does not reach
    with pytest.warns(UnmaskWarning, match="selected 44") if short else nullcontext():
        train(model, torch.optim.SGD(selection.parameters(), lr=0.0), [x], target)
    assert as_lists(selection.indices) == expected


@pytest.mark.parametrize(
    "build",
    [
        lambda: unmask.pafi(3).but(normalise="rows"),
        lambda: unmask.pafi(3).but(allocation="row-column"),
        lambda: unmask.sparse_adapter(3, "synflow").but(normalise="row-column"),
        lambda: unmask.lift(3, rank=0),
        lambda: unmask.lift(3, rank=2.5),
        lambda: unmask.select(mlp(), unmask.id3(3, steps=2).but(normalise="row-column"), exchange="candidates"),
    ],
)
def test_what_cannot_work_is_refused(build):
    with pytest.raises(MethodError, match=r"normalise|allocation|rank ="):
        build()


# LIFT.


def by_svd(matrix, rank):
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("shape", [(7, 7), (40, 9), (9, 40)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_low_rank_approximation_is_the_truncated_svd(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(low_rank(matrix, rank).double(), by_svd(matrix, rank), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)])
def test_of_a_large_matrix_it_is_nearly_that_and_always_the_same(shape, monkeypatch):
    monkeypatch.setattr("unmask.lowrank.EXACT", 8)
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 50, generator=generator)).Q for n in shape)
    matrix = (u * 0.8 ** torch.arange(50)) @ v.t()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = low_rank(matrix, 6), low_rank(matrix, 6)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    best = by_svd(matrix, 6)
    assert (matrix - first).norm() <= 1.001 * (matrix - best).norm()
    assert (first - best).norm() <= 1e-2 * best.norm()


def test_lift_takes_each_linear_layers_share_by_its_approximation():
    model = net()
    weights = {n: p.detach() for n, p in model.named_parameters() if n in ("1.weight", "3.weight")}
    scores = {n: by_svd(w, 2).abs() for n, w in weights.items()}
    selection = unmask.select(model, unmask.lift(50, rank=2))
    caps = {n: math.ceil(50 * w.numel() / 160) for n, w in weights.items()}
    assert as_lists(selection.indices) == greedy(scores, 50, lambda name, i: (name, caps[name]))
    assert as_lists(selection.indices) != greedy(
        {n: w.abs() for n, w in weights.items()}, 50, lambda n, i: (n, caps[n])
    )


def test_lift_of_every_kind_of_tensor():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Conv1d(4, 3, 5), nn.LayerNorm(6), nn.Linear(2, 30)])
    selection = unmask.select(model, unmask.Method("all", 60, unmask.heuristic("lift", rank=2), "static"))
    scores = {n: p.detach().abs() for n, p in model.named_parameters()}
    scores["0.weight"] = by_svd(model[0].weight.detach().view(3, -1), 2).abs()
    assert as_lists(selection.indices) == first_k(scores, 60)


def test_lift_refreshed_ranks_the_trained_weights():
    model = net()
    method = unmask.lift(20, rank=2).but(
        strategy="repeat", schedule=unmask.schedule("uniform", 1, stride=2), allocation="global"
    )
    selection = unmask.select(model, method)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.3)
    for t, x in enumerate(inputs(3)):
        if t == 2:
            trained = {n: by_svd(model.get_parameter(n).detach(), 2).abs() for n in ("1.weight", "3.weight")}
        train(model, optimizer, [x], target)
    assert as_lists(selection.indices) == first_k(trained, 20)


def test_mean_square_is_what_the_helpers_train():
    """`lift` under an optimizer that steps: the budget holds."""
    model = mlp()
    selection = unmask.select(model, unmask.lift(30, rank=2))
    train(model, torch.optim.AdamW(selection.parameters(), lr=0.1), batches(3), mean_square)
    assert selection.used == 30 == sum(f.numel() for f in selection.indices.values())
