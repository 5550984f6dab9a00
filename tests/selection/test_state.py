"""Tests what a selection's state restores, which selections it may be loaded into, and how large it is."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import assert_same_tensors, batches, mean_square, mlp, snapshot, train
from loop_runs import Net, begin_net
from torch import nn

import unmask
from unmask import SelectionError


@pytest.mark.parametrize("preset", ["id3", "repeat_d3", "pafi", "full"])
def test_going_back_within_one_run(preset):
    """The state is loaded into a selection that has trained on since, as loading the best checkpoint does."""
    data = batches(8)
    model, selection, optimizer = begin_net(preset)
    train(model, optimizer, data[:2])
    saved, early, optimizer_state = selection.state_dict(), snapshot(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, data[2:])
    late = snapshot(model)
    mean_square(model, data[0]).backward()  # a backward waits for its step
    selection.load_state_dict(saved)
    optimizer.load_state_dict(optimizer_state)
    optimizer.zero_grad()
    counted = "norm.num_batches_tracked"
    assert_same_tensors(early, snapshot(model))
    assert early[counted] < late[counted]
    train(model, optimizer, data[2:])
    assert_same_tensors(late, snapshot(model))


def test_a_state_loads_into_a_model_that_holds_the_trained_weights_already():
    """A Trainer loads the checkpoint's weights first."""
    model, selection, optimizer = begin_net("id3")
    train(model, optimizer, batches(3))
    other, fresh, _ = begin_net("id3")
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(selection.state_dict())
    assert_same_tensors(snapshot(model), snapshot(other))
    assert torch.equal(fresh.delta().sparse["body.0.weight"].values, selection.delta().sparse["body.0.weight"].values)
    assert fresh.ledger.base.equal(selection.ledger.base)


def _other_heuristic():
    torch.manual_seed(0)
    model = Net()
    return model, unmask.select(model, unmask.id3(17, steps=5, exp=1.0), dense="head")


def _other_budget():
    torch.manual_seed(0)
    model = Net()
    return model, unmask.select(model, unmask.id3(18, steps=5), dense="head")


def _other_steps():
    torch.manual_seed(0)
    model = Net()
    return model, unmask.select(model, unmask.id3(17, steps=6), dense="head")


def _other_patterns():
    torch.manual_seed(0)
    model = Net()
    return model, unmask.select(model, unmask.id3(17, steps=5), dense="head", exclude="norm")


def _other_dense():
    torch.manual_seed(0)
    model = Net()
    return model, unmask.select(model, unmask.id3(17, steps=5), exclude="head")


def _other_shapes():
    model = Net()
    model.body = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 6))
    return model, unmask.select(model, unmask.id3(17, steps=5), dense="head")


def _other_base():
    return begin_net("id3", seed=1)[:2]


REFUSED = {
    "method": _other_heuristic,
    "budget": _other_budget,
    "method ": _other_steps,
    "names": _other_patterns,
    "dense": _other_dense,
    "shapes": _other_shapes,
    "other weights": _other_base,
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_of_something_else_is_refused_and_nothing_is_changed(reason, steps):
    model, selection, optimizer = begin_net("id3")
    train(model, optimizer, batches(3))
    other, target = REFUSED[reason]()
    train(other, torch.optim.SGD(target.parameters(), lr=0.1), batches(steps))
    before, state = snapshot(other), target.state_dict()
    with pytest.raises(SelectionError, match=reason.strip()):
        target.load_state_dict(selection.state_dict())
    assert_same_tensors(before, snapshot(other))
    assert torch.equal(state["values"], target.state_dict()["values"])
    assert (target.step, target.used) == (state["step"], state["used"])


@pytest.mark.parametrize("state", [{}, {"version": 1}, {"version": 99}])
def test_what_is_no_state_is_refused(state):
    _, selection, _ = begin_net("id3")
    with pytest.raises(SelectionError, match=r"lacks|version"):
        selection.load_state_dict(state)


def state_bytes(width, budget):
    selection = unmask.select(mlp(width=width), unmask.id3(budget, steps=1))
    file = io.BytesIO()
    torch.save(selection.state_dict(), file)
    return file.tell()


def test_the_state_grows_with_the_budget_and_not_with_the_model():
    small, large_model, large_budget = state_bytes(16, 500), state_bytes(128, 500), state_bytes(128, 20_500)
    assert abs(large_model - small) < 500
    assert large_budget - large_model == pytest.approx(20_000 * (4 + 4 + 8), rel=0.01)
