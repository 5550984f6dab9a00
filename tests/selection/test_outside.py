"""Tests that a model with a live selection looks like an ordinary model from outside."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import as_lists, assert_same_tensors, batches, id3_run, mean_square, mlp, snapshot, train
from torch import nn

import unmask
from unmask import MethodError, SelectionError


class Marked(nn.Parameter):
    """A parameter class of a user."""


@pytest.fixture
def ordinary():
    """Returns a model with a frozen tensor, a tied one, and a parameter of another class."""
    model = mlp(depth=3)
    model[2].weight = Marked(model[2].weight.detach())
    model[4].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    return model


def test_names_state_dict_and_outputs_are_the_ordinary_models(ordinary):
    names, state, x = [n for n, _ in ordinary.named_parameters()], snapshot(ordinary), batches(1)[0]
    with torch.no_grad():
        out = ordinary(x)
    unmask.select(ordinary, unmask.id3(10, steps=2))
    assert [n for n, _ in ordinary.named_parameters()] == names
    assert_same_tensors(state, snapshot(ordinary))
    assert torch.equal(out, ordinary(x))
    assert all(type(t) is torch.Tensor for t in ordinary.state_dict().values())
    assert not any(p.requires_grad for p in ordinary.parameters())
    assert "Parameter" in repr(ordinary[0].weight)


def test_release_restores_classes_and_flags_and_keeps_the_trained_weights(ordinary):
    kinds, flags = [type(p) for p in ordinary.parameters()], [p.requires_grad for p in ordinary.parameters()]
    attributes = [dict(p.__dict__) for p in ordinary.parameters()]
    selection, optimizer = id3_run(ordinary)
    train(ordinary, optimizer, batches(2))
    trained = snapshot(ordinary)
    selection.release()
    selection.release()
    assert [type(p) for p in ordinary.parameters()] == kinds
    assert [p.requires_grad for p in ordinary.parameters()] == flags
    assert [dict(p.__dict__) for p in ordinary.parameters()] == attributes
    assert_same_tensors(trained, snapshot(ordinary))
    assert ordinary[4].weight is ordinary[0].weight
    mean_square(ordinary, batches(1)[0]).backward()
    assert ordinary[0].weight.grad is not None
    again, _ = id3_run(ordinary)
    assert again.used == 0


def test_a_released_selection_refuses_to_be_used(ordinary):
    selection, optimizer = id3_run(ordinary)
    train(ordinary, optimizer, batches(1))
    state = selection.state_dict()
    selection.release()
    for call in (selection.delta, selection.state_dict, lambda: selection.load_state_dict(state)):
        with pytest.raises(SelectionError, match="after release"):
            call()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_model_are_ordinary_frozen_models(ordinary, way):
    selection, optimizer = id3_run(ordinary)
    train(ordinary, optimizer, batches(1))
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(ordinary, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(ordinary) if way == "deepcopy" else pickle.loads(pickle.dumps(ordinary))
    assert_same_tensors(snapshot(ordinary), snapshot(twin))
    assert twin[4].weight is twin[0].weight
    assert {type(p) for p in twin.parameters()} == {nn.Parameter}
    assert not any(p.requires_grad for p in twin.parameters())
    before, state = snapshot(ordinary), selection.state_dict()
    train(twin.requires_grad_(True), torch.optim.SGD(twin.parameters(), lr=0.1), batches(2))
    assert_same_tensors(before, snapshot(ordinary))
    assert torch.equal(state["values"], selection.state_dict()["values"])
    assert selection.step == 1


def test_a_model_copied_before_select_trains_by_itself():
    model = mlp()
    twin = copy.deepcopy(model)
    selection, optimizer = id3_run(model)
    ordinary = torch.optim.SGD(twin.parameters(), lr=0.1)
    for x in batches(2):
        (mean_square(model, x) + mean_square(twin, x)).backward()
        ordinary.step()
        optimizer.step()
        optimizer.zero_grad()
        ordinary.zero_grad()
    assert selection.step == 2
    assert all(p.requires_grad for p in twin.parameters())


def test_one_selection_at_a_time():
    model = mlp()
    selection = unmask.select(model, unmask.pafi(3))
    with pytest.raises(MethodError, match=r"release\(\) first"):
        unmask.select(model, unmask.pafi(3))
    selection.release()
    assert unmask.select(model, unmask.pafi(3)).used == 3


def test_a_converted_model_keeps_training():
    model = mlp()
    selection, optimizer = id3_run(model)
    train(model, optimizer, batches(1))
    model.to(torch.float64)
    train(model, optimizer, batches(2, dtype=torch.float64))
    held = selection.ledger.positions[: selection.used]
    assert selection.step == 3
    assert torch.equal(selection.ledger.layout.read(held, torch.float32), selection.values.detach()[: selection.used])


# Dynamo looks at the .grad of every tensor that it meets in a frame.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_makes_the_same_run(backend):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = mlp(depth=2)
        selection = unmask.select(model, unmask.id3(20, steps=3, stride=2))
        optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
        train(torch.compile(model, backend=backend) if compiled else model, optimizer, batches(4))
        results.append((snapshot(model), as_lists(selection.indices)))
    torch.testing.assert_close(results[0], results[1])
    torch.compiler.reset()


@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_limitation_functorch_transforms_refuse_a_live_selection(transform):
    model = nn.Linear(6, 6)
    selection = unmask.select(model, unmask.id3(5, steps=2))
    with pytest.raises(RuntimeError, match="setup_context"):
        transform(model)(batches(1)[0])
    with torch.no_grad():
        assert torch.vmap(model)(batches(1)[0]).shape == (4, 6)
    selection.release()
    assert transform(model)(batches(1)[0]).shape == (4, 6)


def test_limitation_clipping_the_models_own_parameters_clips_nothing():
    """They are frozen. ``selection.parameters()`` are to be clipped instead, as `SelectiveTrainer` does."""
    model = mlp()
    selection = unmask.select(model, unmask.random_mask(5))
    mean_square(model, batches(1)[0]).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-9) == 0
    assert selection.values.grad.norm() > 1e-6


def test_a_given_parameter_becomes_the_trainable_vector():
    """An optimizer may be built before the selection is made."""
    values, model = nn.Parameter(torch.ones(12)), mlp()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([values], lr=0.05)
    selection = unmask.select(model, unmask.id3(12, steps=4), values=values)
    assert selection.values is values
    assert not values.any()
    train(model, optimizer, batches(4))
    train(twin, id3_run(twin)[1], batches(4))
    assert_same_tensors(snapshot(twin), snapshot(model))


@pytest.mark.parametrize(
    ("values", "match"),
    [(torch.zeros(11), r"shape torch.Size\(\[11\]\)"), (torch.zeros(12, dtype=torch.float64), "dtype torch.float64")],
)
def test_a_given_parameter_that_does_not_fit_is_refused(values, match):
    model = mlp()
    with pytest.raises(MethodError, match=match):
        unmask.select(model, unmask.id3(12, steps=4), values=nn.Parameter(values))
    assert all(p.requires_grad for p in model.parameters())
