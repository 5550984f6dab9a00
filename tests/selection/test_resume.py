"""A run that stops and goes on in a fresh model is bitwise the uninterrupted one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import assert_same_tensors, batches, mean_square, mlp, snapshot, train
from torch import nn

import unmask
from unmask import SelectionError
from unmask.selection.state import read_state, write_state

LABELLED = [
    {"x": x, "labels": torch.randint(0, 3, (4,), generator=torch.Generator().manual_seed(1))} for x in batches(2)
]


def fisher_loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"].to(model.head.weight.dtype)).float()[:, :3], batch["labels"])


PRESETS = {
    "id3": lambda: unmask.id3(17, steps=5),
    "id3_strided": lambda: unmask.id3(17, steps=5, stride=2, schedule="cosine"),
    "repeat_d3": lambda: unmask.repeat_d3(17),
    "repeat_d3_strided": lambda: unmask.repeat_d3(17, stride=2),
    "repeat_d3_kept": lambda: unmask.repeat_d3(17, stride=2, leaving="kept"),
    "static_d3": lambda: unmask.static_d3(17),
    "id3_column": lambda: unmask.id3(17, steps=5).but(allocation="column"),
    "pafi": lambda: unmask.pafi(17),
    "fish": lambda: unmask.fish(17, LABELLED, loss=fisher_loss),
    "bitfit": lambda: unmask.bitfit(),
    "random_mask": lambda: unmask.random_mask(17, seed=3),
    "random_increment": lambda: unmask.random_mask(17).but(
        strategy="increment", schedule=unmask.Schedule.of("uniform", 5)
    ),
    "random_repeat": lambda: unmask.random_mask(17).but(strategy="repeat"),
    "full": lambda: unmask.full(),
}


class Net(nn.Module):
    """With running statistics, which travel too."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = mlp(), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def begin(preset, dtype=torch.float32, dense="head", seed=0):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    method = PRESETS[preset]()
    selection = unmask.select(model, method, dense=None if method.whole else dense)
    return model, selection, torch.optim.AdamW(selection.parameters(), lr=0.05, weight_decay=0.1)


def through_torch_save(state, tmp_path):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_state_file(state, tmp_path):
    return read_state(write_state(state, tmp_path / "state.safetensors"))


@pytest.mark.parametrize("way", [through_torch_save, through_state_file])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(preset, dtype, way, tmp_path):
    data = batches(7, dtype=dtype)
    straight, selection, optimizer = begin(preset, dtype)
    train(straight, optimizer, data)
    for stop in (1, 4):
        first, before, opt = begin(preset, dtype)
        train(first, opt, data[:stop])
        saved, opt_state = way(before.state_dict(), tmp_path), copy.deepcopy(opt.state_dict())
        second, after, opt = begin(preset, dtype)
        after.load_state_dict(saved)
        opt.load_state_dict(opt_state)
        assert_same_tensors(snapshot(first), snapshot(second))
        train(second, opt, data[stop:])
        assert_same_tensors(snapshot(straight), snapshot(second))
        assert_same_tensors(selection.indices, after.indices)
        assert (after.step, after.used) == (selection.step, selection.used)


@pytest.mark.parametrize("preset", ["id3", "repeat_d3", "pafi", "full"])
def test_going_back_within_one_run(preset):
    """As loading the best checkpoint does: into a selection that has moved on."""
    data = batches(8)
    model, selection, optimizer = begin(preset)
    train(model, optimizer, data[:2])
    saved, early, optimizer_state = selection.state_dict(), snapshot(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, data[2:])
    late = snapshot(model)
    mean_square(model, data[0]).backward()  # and a batch in flight
    selection.load_state_dict(saved)
    optimizer.load_state_dict(optimizer_state)
    optimizer.zero_grad()
    counted = "norm.num_batches_tracked"
    assert_same_tensors(early, snapshot(model))
    assert early[counted] < late[counted]
    train(model, optimizer, data[2:])
    assert_same_tensors(late, snapshot(model))


def test_a_state_loads_into_a_model_that_holds_the_trained_weights_already():
    """A Trainer that loads the checkpoint's weights first."""
    model, selection, optimizer = begin("id3")
    train(model, optimizer, batches(3))
    other, fresh, _ = begin("id3")
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(selection.state_dict())
    assert_same_tensors(snapshot(model), snapshot(other))
    assert torch.equal(fresh.delta().sparse["body.0.weight"].values, selection.delta().sparse["body.0.weight"].values)
    assert fresh._table.base.equal(selection._table.base)


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
    return begin("id3", seed=1)[:2]


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
    model, selection, optimizer = begin("id3")
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
    _, selection, _ = begin("id3")
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
