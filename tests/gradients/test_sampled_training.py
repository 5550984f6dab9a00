"""Checks that gradients at the selected entries train as whole gradients do, in steps that select nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    as_lists,
    assert_same_tensors,
    dense_gradients,
    gradient_at_slots,
)
from layer_nets import ALL_CASES, X, assert_unselected, build, loss_of, run, weights
from nets import loss, mixed, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

import unmask
from unmask.gradients import linear


@pytest.fixture(params=["compact", "sampled"])
def how(request, monkeypatch):
    """Sets the product of every linear operation; these products are too small for the cost model to take the second one."""
    monkeypatch.setattr(linear, "choose", lambda *args, **options: request.param)
    return request.param


METHODS = {
    "random": unmask.random_mask("30%"),
    "static_d3": unmask.static_d3("20%"),
    "id3": unmask.id3("30%", steps=12, stride=4),
    "pafi": unmask.pafi("30%").but(strategy="increment", schedule=unmask.Schedule.of("uniform", 12)),
    "repeat_d3": unmask.repeat_d3("20%", stride=5),
}


@pytest.mark.parametrize("case", ALL_CASES)
@pytest.mark.parametrize("budget", ["100%", "25%"])
def test_the_gradient_at_the_slots_is_the_dense_gradient(case, budget, how):
    model, x = build(case)
    dense = dense_gradients(model, lambda m: loss_of(m, x))
    selection = unmask.select(model, unmask.random_mask(budget, seed=2), gradients="sampled")
    loss_of(model, x).backward()
    torch.testing.assert_close(selection.values.grad, gradient_at_slots(selection, dense), rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:step .* was to select:unmask.UnmaskWarning")  # rows that no token has seen
@pytest.mark.parametrize("case", ALL_CASES)
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_are_those_of_dense_gradients(case, method, monkeypatch):
    product = ("compact", "sampled")[len(case + method) % 2]
    monkeypatch.setattr(linear, "choose", lambda *args, **options: product)
    model, x = build(case, torch.float64)
    base = weights(model)
    results = [run(copy.deepcopy(model), x, METHODS[method], gradients) for gradients in ("dense", "sampled")]
    (dense, expected), (sampled, result) = results
    assert as_lists(dense.indices) == as_lists(sampled.indices)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)
    assert any(not torch.equal(base[name], result[name]) for name in base)


@pytest.mark.parametrize("gradients", ["auto", "sampled"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocation", ["global", "row"])
def test_a_tied_network_trains_as_with_dense_gradients(method, gradients, allocation):
    method = METHODS[method].but(allocation=allocation)
    results = []
    for kind in ("dense", gradients):
        model = mixed()
        base, selection = weights(model), unmask.select(model, method, gradients=kind)
        optimizer = torch.optim.AdamW(selection.parameters(), lr=3e-3, eps=1e-4)
        for step in range(15):
            loss(model, tokens(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_unselected(model, base, selection)
        results.append((as_lists(selection.indices), weights(model)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


PATTERNS = {  # These say which of a Linear's tensors are selected, trained whole, or neither.
    "weight alone": {"include": "weight"},
    "bias alone": {"include": "bias"},
    "both": {},
    "weight, and the bias whole": {"dense": "bias"},
    "bias, and the weight whole": {"dense": "weight"},
    "weight of one, bias of the other": {"include": [r"0\.weight", r"2\.bias"]},
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_and_bias_each_selected_whole_or_frozen(pattern, kind, dtype, how):
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 8), nn.Tanh(), kind(8, 5)).to(dtype)
    results = []
    for gradients in ("dense", "sampled"):
        twin = copy.deepcopy(model)
        base, selection = (
            weights(twin),
            unmask.select(twin, unmask.random_mask(5), gradients=gradients, **PATTERNS[pattern]),
        )
        loss_of(twin, X.to(dtype).view(2, 2, 6)).backward()
        results.append([None if p.grad is None else p.grad.clone() for p in selection.parameters()])
        torch.optim.SGD(selection.parameters(), lr=0.1).step()
        if "dense" not in PATTERNS[pattern]:
            assert_unselected(twin, base, selection)
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=rtol / 10)
        assert right.abs().sum() > 0


def test_rows_that_no_token_reads_keep_a_zero_gradient_and_are_not_moved_by_it(how):
    model = nn.Embedding(40, 4, padding_idx=3)
    base, selection = weights(model), unmask.select(model, unmask.random_mask("100%"), gradients="sampled")
    ids = torch.tensor([[5, 3, 5], [39, 3, 0]])
    loss_of(model, ids).backward()
    positions = selection.ledger.positions
    read = torch.isin(positions // 4, torch.tensor([0, 5, 39]))
    assert (selection.values.grad[read] != 0).all()
    assert (selection.values.grad[~read] == 0).all()
    torch.optim.SGD(selection.parameters(), lr=0.1).step()
    assert (weights(model)["weight"] != base["weight"]).any(1).nonzero().squeeze(1).tolist() == [0, 5, 39]


def test_an_unselected_tensor_between_selected_ones_is_bitwise_untouched(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    base, selection = (
        weights(model),
        unmask.select(model, unmask.random_mask(20), include=["^0", "^2"], gradients="sampled"),
    )
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(model, X).backward()
        optimizer.step()
    assert_same_tensors(
        {n: t for n, t in base.items() if n[0] == "1"}, {n: t for n, t in weights(model).items() if n[0] == "1"}
    )
    assert_unselected(model, base, selection)
