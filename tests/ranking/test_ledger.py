"""Checks the ledger of the slots against plain indexing, and through the steps of a selection."""

from __future__ import annotations

import pytest
import torch
from helpers import mlp, snapshot
from torch import Tensor, nn

import unmask
from unmask.ranking.ledger import Layout, Ledger, Slots


def ledger(slots: int = 6) -> Ledger:
    """Makes slots for a matrix, an empty tensor and a vector, whose weights are their positions."""
    tensors = [torch.arange(12.0).view(3, 4), torch.zeros(0), torch.arange(12.0, 17.0)]
    return Ledger(Layout(["a", "b", "c"], tensors), nn.Parameter(torch.zeros(slots)), slots)


def weights(of: Ledger) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in of.layout.tensors])


def proposed(positions: list[int]) -> Ledger:
    """Makes a ledger that has committed these positions, with 100 added to each weight, and proposes 7 for slot 0."""
    held = ledger()
    held.propose(torch.tensor(positions), torch.arange(len(positions)), fresh=len(positions), missing=0)
    held.commit(len(positions))
    with torch.no_grad():
        held.values[: len(positions)] += 100
    held.scatter()
    held.propose(torch.tensor([7]), torch.tensor([0]), fresh=0, missing=0)
    return held


def test_slots_are_found_by_position_and_by_tensor():
    held = ledger()
    held.assign(torch.tensor([1, 3, 0]), torch.tensor([14, 2, 5]), torch.tensor([14.0, 2.0, 5.0]))
    held.assign(torch.tensor([2]), torch.tensor([1]), torch.tensor([1.0]))
    assert held.find(torch.tensor([1, 2, 3, 5, 13, 14, 16])).tolist() == [2, 3, -1, 0, -1, 1, -1]
    assert (held.occupied(), held.held) == ([0, 2], 4)
    first = held.members(0)
    assert (first.flat.tolist(), first.slots.tolist()) == ([1, 2, 5], [2, 3, 0])
    assert held.members(1) is None


def test_a_commit_gives_a_weight_that_leaves_its_base_value_and_a_withdrawal_changes_nothing():
    held = proposed([2, 13])
    before = held.snapshot()
    assert (before.values.tolist()[:2], held.values[0].item()) == ([102.0, 113.0], 7.0)
    assert held.trained().tolist()[:2] == [102.0, 113.0]
    held.withdraw()
    assert held.values.tolist()[:2] == [102.0, 113.0]
    held = proposed([2, 13])
    held.commit(2)
    expected = torch.arange(17.0)
    expected[13] = 113
    assert torch.equal(weights(held), expected)
    assert held.find(torch.tensor([2, 7, 13])).tolist() == [-1, 0, 1]
    assert held.step == 2


def test_a_proposal_is_in_no_snapshot_and_a_snapshot_restores_all():
    held = proposed([2, 13])
    saved = held.snapshot()
    held.commit(2)
    with torch.no_grad():
        held.values[:2] += 1  # Weight 7 is trained now, and has no slot in the snapshot.
    held.scatter()
    held.restore(saved)
    expected = torch.arange(17.0)
    expected[[2, 13]] += 100
    assert torch.equal(weights(held), expected)
    assert held.tentative is None
    assert not held.writes.new
    for name, value in vars(held.snapshot()).items():
        assert torch.equal(value, getattr(saved, name)) if isinstance(value, Tensor) else value == getattr(saved, name)


def test_slots_not_in_use_are_zero_in_a_snapshot_and_leave_the_tensors_alone():
    held = ledger()
    held.reserve(torch.tensor([16, 0, 3, 8, 9, 10]))
    held.unmask(2)
    held.commit(2)
    with torch.no_grad():
        held.values.add_(1.0)  # Slots that are not in use change too.
    held.scatter()
    expected = torch.arange(17.0)
    expected[[16, 0]] += 1
    assert torch.equal(weights(held), expected)
    assert held.snapshot().values.tolist() == [17.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_unmasking_leaves_what_is_trained():
    held = ledger()
    held.reserve(torch.tensor([16, 0, 3, 8, 9, 10]))
    held.unmask(2)
    held.commit(2)
    with torch.no_grad():
        held.values[:2] += 1
    held.unmask(3)
    assert held.values.tolist() == [17.0, 1.0, 3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("picked", [None, torch.tensor([1])])
def test_a_states_entries_name_the_picks_only_where_there_are_some(picked):
    slots = Slots(torch.tensor([3]), torch.ones(1), torch.ones(1), 1, 4, picked)
    assert [*slots.entries()] == [
        "step",
        "used",
        "values",
        "base",
        "positions",
        *(["picked"] if picked is not None else []),
    ]


def test_a_known_order_that_is_unmasked_step_by_step_leaves_later_weights_as_they_were():
    model = mlp()
    before = snapshot(model)
    method = unmask.random_mask(budget=12).but(strategy="increment", schedule=unmask.id3(12, steps=4).schedule)
    selection = unmask.select(model, method)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert (selection.used, selection.ledger.held) == (3, 12)
    for name, tensor in snapshot(model).items():
        changed = (tensor != before[name]).reshape(-1).nonzero().squeeze(1)
        assert torch.isin(changed, selection.indices.get(name, torch.empty(0))).all()


def test_a_waiting_choice_of_repeat_s_does_not_make_values_and_model_differ():
    model = mlp()
    selection = unmask.select(model, unmask.repeat_d3(budget=5))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    for seed in range(4):
        model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        if seed and selection.ledger.tentative.slots.numel():
            break
        optimizer.step()
        optimizer.zero_grad()
    held = selection.ledger
    assert held.tentative.replaces
    in_model = held.layout.read(held.positions[: held.used], torch.float32)
    assert torch.equal(held.trained()[: held.used], in_model)
    assert not torch.equal(held.values[: held.used], in_model)
    assert selection.state_dict()["used"] == 5  # The state is not refused.
