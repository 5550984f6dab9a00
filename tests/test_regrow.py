"""Drop and regrow: an exact budget, exchanged where the schedule says, resumed exactly."""

from __future__ import annotations

import math

import pytest
import torch

import unmask
from helpers import (
    as_lists,
    assert_unselected_is_base,
    batches,
    d3_scores,
    dense_gradients,
    first_k,
    mean_square,
    mlp,
    snapshot,
    train,
)
from unmask import MethodError
from unmask.gradients import window

B, T, K = 30, 12, 3


def begin(method=None, **options):
    torch.manual_seed(0)
    model = mlp()
    selection = unmask.select(model, method or unmask.regrow(B, T, drop=0.5, stride=K), **options)
    return model, selection, torch.optim.AdamW(selection.parameters(), lr=0.05, weight_decay=0.1)


def positions(selection):
    return selection._table.positions.clone()


def test_the_budget_is_exact_and_slots_change_hands_on_the_schedule_alone():
    model, selection, optimizer = begin()
    base, before, changes = snapshot(model), None, {}
    for t, x in enumerate(batches(T + 4)):
        train(model, optimizer, [x])
        assert selection.used == B == sum(f.numel() for f in selection.indices.values())
        assert_unselected_is_base(model, base, selection)
        if before is not None:
            changes[t] = int((positions(selection) != before).sum())
        before = positions(selection)
    expected = {t: math.floor(0.5 * B * (1 + math.cos(math.pi * t / T)) / 2) for t in (3, 6, 9)}
    assert {t for t, n in changes.items() if n} <= set(expected)
    assert all(changes[t] <= expected[t] for t in expected)
    assert changes[3] > 2  # what is dropped and best-scored at once stays


def test_the_least_changed_compete_with_all_that_is_not_unmasked():
    model, selection, optimizer = begin()
    data = batches(4)
    train(model, optimizer, data[:3])
    change = (selection.values.detach() - selection._table.base).abs()
    kept = change.argsort(descending=True)[: B - selection.method.dropped(3, B)]
    held = {n: [] for n, _ in model.named_parameters()}
    for slot in kept.tolist():
        index = int(torch.searchsorted(selection._layout.bounds, positions(selection)[slot], right=True)) - 1
        held[selection._layout.names[index]].append(int(positions(selection)[slot]) - selection._layout.starts[index])
    gradients = dense_gradients(model, lambda m: mean_square(m, data[3]))
    taken = {n: torch.tensor(flat) for n, flat in held.items()}
    best = first_k(d3_scores(model, gradients), selection.method.dropped(3, B), taken)
    train(model, optimizer, data[3:])
    expected = {n: sorted([*held[n], *best.get(n, [])]) for n in held}
    assert as_lists(selection.indices) == {n: flat for n, flat in expected.items() if flat}


def test_who_enters_has_fresh_state_and_who_stays_keeps_it():
    model, selection, optimizer = begin()
    data = batches(4)
    train(model, optimizer, data[:3])
    before, state = positions(selection), optimizer.state[selection.values]["exp_avg"].clone()
    mean_square(model, data[3]).backward()
    gradient = selection.values.grad.clone()
    optimizer.step()
    changed = positions(selection) != before
    after = optimizer.state[selection.values]["exp_avg"]
    assert 0 < int(changed.sum()) < B
    torch.testing.assert_close(after[changed], 0.1 * gradient[changed])
    torch.testing.assert_close(after[~changed], 0.9 * state[~changed] + 0.1 * gradient[~changed])


@pytest.mark.parametrize("accumulation", ["exact", "candidates"])
def test_micro_batches_choose_by_their_sum_and_an_abandoned_backward_chooses_nothing(accumulation, monkeypatch):
    monkeypatch.setattr(window, "OVERSAMPLE", 126)  # so that the first micro-batch rules out nothing
    model, selection, optimizer = begin(accumulation=accumulation)
    twin, other, second = begin()
    for t, x in enumerate(batches(7, size=8)):
        if t == 3:
            mean_square(model, x.flip(1)).backward()  # dropped
            optimizer.zero_grad()
        for half in x.split(4):
            (mean_square(model, half) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        train(twin, second, [x])
        assert as_lists(selection.indices) == as_lists(other.indices)
    torch.testing.assert_close(snapshot(model), snapshot(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("allocation", ["tensor", "row", "column"])
@pytest.mark.parametrize("heuristic", ["random", "d3", "magnitude", "lift"])
def test_caps_hold_although_what_they_bound_is_exchanged(heuristic, allocation):
    parts = {"heuristic": unmask.heuristic(heuristic), "allocation": allocation, "scope": unmask.Scope("linear")}
    model, selection, optimizer = begin(unmask.regrow(40, T, drop=0.9, stride=1).but(**parts))
    size = 36 if allocation == "tensor" else 6
    changed = 0
    for x in batches(T):
        before = positions(selection)
        train(model, optimizer, [x])
        changed += int((before != positions(selection)).sum())
        assert selection.used == 40
        for flat in selection.indices.values():
            group = {"tensor": flat * 0, "row": flat // 6, "column": flat % 6}[allocation]
            assert torch.bincount(group).max() <= math.ceil(40 * size / 108)
    assert changed > 60


def test_everything_unmasked_has_nobody_to_exchange_with():
    model, selection, optimizer = begin(unmask.regrow(126, T, drop=0.5, stride=1))
    train(model, optimizer, batches(1))
    before = positions(selection)
    train(model, optimizer, batches(4))
    assert torch.equal(before, positions(selection))


@pytest.mark.parametrize(
    "build",
    [
        lambda: unmask.regrow(3, steps=4, drop=1.0),
        lambda: unmask.regrow(3, steps=4, drop=-0.1),
        lambda: unmask.regrow(3, steps=4, drop=math.nan),
        lambda: unmask.regrow(3, steps=4, drop=True),
        lambda: unmask.static_d3(3).but(drop=0.1),
        lambda: unmask.repeat_d3(3).but(drop=0.1),
        lambda: unmask.fish(3, [1]).but(drop=0.1, strategy="increment"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(build):
    with pytest.raises(MethodError, match="drop ="):
        build()
