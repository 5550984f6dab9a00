"""Tests that micro-batches give the gradients of the big batch, and that a selection is final only after the optimizer's step."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    as_lists,
    assert_same_tensors,
    batches,
    d3_scores,
    dense_gradients,
    first_k,
    gradient_at_slots,
    mean_square,
    mlp,
    snapshot,
)

import unmask

MODES = ["candidates", "exact"]
METHODS = {
    "id3": unmask.id3(24, steps=3),
    "strided": unmask.id3(24, steps=3, stride=2),
    "repeat": unmask.repeat_d3(24),
    "repeat_strided": unmask.repeat_d3(24, stride=2),
    "static": unmask.static_d3(24),
    "row": unmask.id3(24, steps=3).but(allocation="row"),
    "random": unmask.random_mask(24),
}


def backward_in_parts(model, x, parts):
    for part in x.chunk(parts):
        (mean_square(model, part) / parts).backward()


def run(method, mode, parts, steps=4, model=None, lr=0.1):
    torch.manual_seed(0)
    model = model or mlp()
    selection = unmask.select(model, method, accumulation=mode)
    optimizer = torch.optim.SGD(selection.parameters(), lr=lr, momentum=0.9)
    for x in batches(steps, size=8):
        backward_in_parts(model, x, parts)
        optimizer.step()
        optimizer.zero_grad()
    return model, selection


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", [2, 4])
def test_exact_accumulation_is_the_run_of_one_big_batch(method, parts):
    whole, in_parts = (run(METHODS[method], "exact", n) for n in (1, parts))
    assert as_lists(whole[1].indices) == as_lists(in_parts[1].indices)
    torch.testing.assert_close(snapshot(whole[0]), snapshot(in_parts[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_with_one_micro_batch_both_modes_are_the_same_run(method):
    results = [run(METHODS[method], mode, 1) for mode in MODES]
    assert_same_tensors(snapshot(results[0][0]), snapshot(results[1][0]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_every_slot_is_that_of_the_big_batch_at_every_step(method, mode):
    model = mlp()
    selection = unmask.select(model, METHODS[method], accumulation=mode)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    for x in batches(4, size=8):
        dense = dense_gradients(model, lambda m, x=x: mean_square(m, x))
        backward_in_parts(model, x, 4)
        torch.testing.assert_close(selection.values.grad, gradient_at_slots(selection, dense), rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("parts", [1, 3])
def test_candidates_are_the_best_by_summed_gradient_among_the_first_micro_batchs_best(parts):
    model, x = mlp(), torch.cat(batches(3))
    budget, selection = 9, unmask.select(model, unmask.static_d3(9))
    first = d3_scores(model, dense_gradients(model, lambda m: mean_square(m, x.chunk(parts)[0])))
    summed = d3_scores(model, dense_gradients(model, lambda m: mean_square(m, x)))
    among = {name: torch.tensor(flat) for name, flat in first_k(first, 4 * budget).items()}
    for name, scores in summed.items():
        keep = among.get(name, torch.empty(0, dtype=torch.int64))
        scores.view(-1)[~torch.isin(torch.arange(scores.numel()), keep)] = -1.0
    backward_in_parts(model, x, parts)
    torch.optim.SGD(selection.parameters(), lr=0.1).step()
    assert as_lists(selection.indices) == first_k(summed, budget)


def test_a_later_micro_batch_can_overturn_the_first_ones_choice():
    models = [run(unmask.static_d3(6), "exact", parts, steps=1)[1] for parts in (1, 8)]
    torch.manual_seed(0)
    model = mlp()
    alone = unmask.select(model, unmask.static_d3(6))
    mean_square(model, batches(1, size=8)[0].chunk(8)[0]).backward()
    torch.optim.SGD(alone.parameters(), lr=0.1).step()
    assert as_lists(models[0].indices) == as_lists(models[1].indices) != as_lists(alone.indices)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_a_dropped_batch_consumes_nothing(method, mode, set_to_none):
    results = []
    for drop in (False, True):
        torch.manual_seed(0)
        model = mlp()
        selection = unmask.select(model, METHODS[method], accumulation=mode)
        optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
        for i, x in enumerate(batches(4, size=8)):
            if drop:
                state = selection.state_dict()
                backward_in_parts(model, 3 * batches(9)[4 + i], 2)
                optimizer.zero_grad(set_to_none=set_to_none)
                assert (selection.used, selection.step) == (state["used"], i)
                assert_same_tensors({"values": selection.state_dict()["values"]}, {"values": state["values"]})
            backward_in_parts(model, x, 2)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        results.append(model)
    assert_same_tensors(snapshot(results[0]), snapshot(results[1]))


@pytest.mark.parametrize("mode", MODES)
def test_repeat_keeps_the_budget_exactly_and_what_leaves_is_the_base_again(mode):
    model = mlp()
    base = snapshot(model)
    selection = unmask.select(model, unmask.repeat_d3(20), accumulation=mode)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.3)
    seen = set()
    for x in batches(6, size=8):
        backward_in_parts(model, x, 2)
        optimizer.step()
        optimizer.zero_grad()
        seen |= {(name, i) for name, flat in selection.indices.items() for i in flat.tolist()}
        now = snapshot(model)
        for name, flat in selection.indices.items():
            now[name].view(-1)[flat] = base[name].view(-1)[flat]
        assert_same_tensors(now, base)
        assert sum(flat.numel() for flat in selection.indices.values()) == 20
    assert len(seen) > 20


def test_a_slot_that_gets_another_weight_starts_with_fresh_optimizer_state():
    model = mlp()
    selection = unmask.select(model, unmask.repeat_d3(20))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.0, momentum=0.9)
    before = None
    for x in batches(4):
        mean_square(model, x).backward()
        gradient = selection.values.grad.clone()
        optimizer.step()
        now = selection.ledger.positions.clone()
        if before is not None and (now != before).any():
            entered = now != before
            momentum = optimizer.state[selection.values]["momentum_buffer"]
            assert torch.equal(momentum[entered], gradient[entered])
            assert not torch.equal(momentum[~entered], gradient[~entered])
            return
        before = now
    pytest.fail("no slot changed hands, so the test shows nothing")


@pytest.mark.parametrize("mode", MODES)
def test_sums_of_bfloat16_micro_gradients_are_taken_in_float32(mode):
    model = mlp(dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    selection = unmask.select(model, unmask.static_d3(12), accumulation=mode)
    expected = {name: torch.zeros(p.shape) for name, p in twin.named_parameters()}
    for x in batches(40, dtype=torch.bfloat16):
        mean_square(model, x).backward()
        for name, gradient in dense_gradients(twin, lambda m, x=x: mean_square(m, x)).items():
            expected[name] += gradient.float()
    torch.testing.assert_close(selection.values.grad, gradient_at_slots(selection, expected), rtol=1e-5, atol=1e-6)
