"""Tests that recomputed forwards, interrupted backwards and several graphs give the gradients of ordinary autograd."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_tensors, dense_gradients, gradient_at_slots, mlp, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import unmask
from unmask import ScheduleNotRunError

# Reentrant segments inside reentrant segments run their forward under no_grad; torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")

KINDS = {"none": None, "reentrant": True, "non-reentrant": False}


def run(kind, function, *args):
    return function(*args) if KINDS[kind] is None else checkpoint(function, *args, use_reentrant=KINDS[kind])


class Net(nn.Module):
    """A net of segments; one module is shared by segments, and one is also used outside of them."""

    def __init__(self, kind="none", nested=False):
        super().__init__()
        self.kind, self.nested = kind, nested
        self.first, self.second, self.shared, self.outside = (nn.Linear(6, 6) for _ in range(4))

    def segment(self, layer, x):
        inner = (lambda h: run(self.kind, self.shared, h)) if self.nested else self.shared
        return inner(layer(x).tanh()).tanh() + self.outside(x)

    def forward(self, x):
        x = self.outside(x)
        for layer in (self.first, self.second):
            x = run(self.kind, self.segment, layer, x)
        return self.outside(x)


def loss_of(model, x):
    return model(x).sin().sum()


def data(seed=0, requires_grad=True):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).requires_grad_(requires_grad)


def build(kind="none", nested=False, method=None):
    model = Net(kind, nested)
    return model, unmask.select(model, method or unmask.random_mask(budget="100%"))


def dense_of(model, loss):
    """Returns the gradients by ordinary autograd, on a twin without checkpointing."""
    twin = Net()
    twin.load_state_dict(model.state_dict())
    return dense_gradients(twin, loss)


def assert_dense_gradient(selection, dense):
    torch.testing.assert_close(selection.values.grad, gradient_at_slots(selection, dense), rtol=1e-5, atol=1e-6)


PARAMS = [(kind, nested) for kind in KINDS for nested in (False, True) if not (kind == "none" and nested)]
every_kind = pytest.mark.parametrize(("kind", "nested"), PARAMS)


@every_kind
def test_recomputed_segments_give_the_dense_gradient(kind, nested):
    model, selection = build(kind, nested)
    loss_of(model, data()).backward()
    assert_dense_gradient(selection, dense_of(model, lambda m: loss_of(m, data())))


@every_kind
def test_recomputed_segments_give_the_same_id3_run(kind, nested):
    models = []
    for k, n in (("none", False), (kind, nested)):
        torch.manual_seed(0)
        model, selection = build(k, n, unmask.id3(budget=40, steps=3, stride=2))
        optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05)
        for i in range(5):
            loss_of(model, data(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append((model, selection))
    plain, recomputed = models
    assert {n: i.tolist() for n, i in plain[1].indices.items()} == {
        n: i.tolist() for n, i in recomputed[1].indices.items()
    }
    torch.testing.assert_close(dict(plain[0].named_parameters()), dict(recomputed[0].named_parameters()))


@every_kind
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_evaluation_between_forward_and_backward_changes_nothing(kind, nested, mode):
    model, selection = build(kind, nested)
    loss = loss_of(model, data())
    with torch.no_grad():
        model.train(mode == "train")
        loss_of(model, data(1))
        model.train()
    loss.backward()
    assert_dense_gradient(selection, dense_of(model, lambda m: loss_of(m, data())))


@every_kind
def test_two_forwards_before_one_backward(kind, nested):
    model, selection = build(kind, nested)
    (loss_of(model, data()) + loss_of(model, data(1))).backward()
    assert_dense_gradient(selection, dense_of(model, lambda m: loss_of(m, data()) + loss_of(m, data(1))))


@every_kind
def test_two_forwards_then_two_backwards(kind, nested):
    model, selection = build(kind, nested)
    losses = [loss_of(model, data(i)) for i in range(2)]
    for loss in losses:
        loss.backward()
    assert_dense_gradient(selection, dense_of(model, lambda m: loss_of(m, data()) + loss_of(m, data(1))))


@pytest.mark.parametrize("kind", ["none", "non-reentrant"])
def test_two_backwards_of_one_graph(kind):
    model, selection = build(kind)
    loss = loss_of(model, data())
    loss.backward(retain_graph=True)
    loss.backward()
    assert_dense_gradient(selection, dense_of(model, lambda m: 2 * loss_of(m, data())))


def hidden_state(model):
    """Runs truncated backpropagation with an overlap: the second graph contains the first one."""
    hidden = model(data())
    yield hidden.sin().sum()
    yield model(hidden).cos().sum()


def interleaved(model):
    """Runs three graphs, of which the last begins before the second backward."""
    losses = [loss_of(model, data(i)) for i in range(3)]
    yield losses[0]
    losses.append(loss_of(model, data(3)))
    yield losses[1]
    yield losses[2] + losses[3] + loss_of(model, data(4))


@pytest.mark.parametrize("kind", ["none", "non-reentrant"])
@pytest.mark.parametrize("losses", [hidden_state, interleaved])
@pytest.mark.parametrize(
    ("method", "accumulation"),
    [(unmask.random_mask("100%"), "exact"), (unmask.static_d3(30), "candidates"), (unmask.static_d3(30), "exact")],
)
def test_graphs_that_reach_across_an_earlier_backward(kind, losses, method, accumulation):
    model = Net(kind)
    selection = unmask.select(model, method, accumulation=accumulation)
    for loss in losses(model):
        loss.backward(retain_graph=True)
    assert_dense_gradient(selection, dense_of(model, lambda m: sum(losses(m))))


class Explosive(torch.autograd.Function):
    armed = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Explosive.armed:
            raise ArithmeticError("boom")
        return gradient


@pytest.mark.parametrize("accumulation", ["candidates", "exact"])
@pytest.mark.parametrize(
    "method", [unmask.id3(20, steps=2), unmask.repeat_d3(20), unmask.random_mask(20)], ids=lambda m: m.name
)
@every_kind
def test_a_backward_that_dies_leaves_the_step_to_the_next_one(kind, nested, method, accumulation):
    results = []
    for dies in (False, True):
        torch.manual_seed(0)
        model = Net(kind, nested)
        before = snapshot(model)
        selection = unmask.select(model, method, accumulation=accumulation)
        optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)

        def backward(x, model=model):
            loss_of(model, Explosive.apply(x)).backward()  # this dies after most taps have handed their gradient over

        for i in range(3):
            if dies:
                Explosive.armed = True
                with pytest.raises(ArithmeticError):
                    backward(data(9))
                Explosive.armed = False
                if i == 0:
                    with pytest.raises(ScheduleNotRunError):
                        optimizer.step()
                    assert_same_tensors(before, snapshot(model))
            backward(data(i))
            optimizer.step()
            optimizer.zero_grad()
        results.append((snapshot(model), selection.indices))
    assert_same_tensors(results[0][0], results[1][0])
    assert_same_tensors(results[0][1], results[1][1])


@pytest.mark.parametrize(("accumulation", "counted"), [("candidates", [0, 2]), ("exact", [2])])
def test_a_micro_batch_that_dies_does_not_count(accumulation, counted):
    """Under "exact", half of its dense gradients are in the sums already, so the window starts again."""
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    selection, expected = (unmask.select(m, unmask.static_d3(20), accumulation=accumulation) for m in (model, twin))
    loss_of(model, data(0)).backward()
    Explosive.armed = True
    with pytest.raises(ArithmeticError):
        loss_of(model, Explosive.apply(data(1))).backward()
    Explosive.armed = False
    loss_of(model, data(2)).backward()
    for i in counted:
        loss_of(twin, data(i)).backward()
    assert torch.equal(selection.values.grad, expected.values.grad)
    assert torch.equal(selection.values, expected.values)


@pytest.mark.parametrize("kind", ["none", "non-reentrant"])
def test_a_gradient_for_the_inputs_does_not_disturb_the_selection(kind):
    model, selection = build(kind, method=unmask.static_d3(20))
    x = data()
    loss = loss_of(model, x)
    (wanted,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert wanted.abs().sum() > 0
    assert selection.values.grad is None
    loss.backward()
    dense = dense_of(model, lambda m: loss_of(m, data()))
    assert_dense_gradient(selection, dense)


def test_a_gradient_penalty_reaches_the_slots():
    def penalty(model):
        x = data()
        (slope,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
        return slope.square().sum()

    model, selection = build()
    penalty(model).backward()
    assert_dense_gradient(selection, dense_of(model, penalty))


def test_checkpoint_sequential_over_all_layers():
    model = mlp(depth=4)
    dense = dense_gradients(model, lambda m: m(data(requires_grad=False)).sin().sum())
    selection = unmask.select(model, unmask.random_mask(budget="100%"))
    checkpoint_sequential(model, 3, data(), use_reentrant=True).sin().sum().backward()
    assert_dense_gradient(selection, dense)


def test_limitation_reentrant_segments_that_share_a_module_need_training_mode_on_a_selecting_step():
    model, selection = build("reentrant", method=unmask.static_d3(10))
    with pytest.raises(unmask.SelectionError, match=r"model\.train\(\)"):
        loss_of(model.eval(), data()).backward()
    assert selection.values.grad is None
    loss_of(model.train(), data()).backward()
    assert_dense_gradient(selection, dense_of(model, lambda m: loss_of(m, data())))
