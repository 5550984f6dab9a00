"""Checks that inputs that are made again have the same bits as saved ones, and take less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import unmask
from unmask.gradients import linear
from unmask.gradients.linear import again, origin

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "gated": lambda x: F.silu(x) * x.flip(-1),
    "scaled": lambda x: x * 3.0,
}


class Block(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(16, 64), nn.Linear(64, 16), activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


@pytest.fixture(params=["compact", "sampled"])
def how(request, monkeypatch):
    monkeypatch.setattr(linear, "choose", lambda *args, **options: request.param)


def gradient(model, backward, recomputes, monkeypatch, method=None):
    monkeypatch.setattr(linear, "origin", origin if recomputes else lambda x: None)
    selection = unmask.select(copy.deepcopy(model), method or unmask.random_mask("50%", seed=1), gradients="sampled")
    backward(selection.model)
    return selection.values.grad


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("method", ["static", "id3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_bitwise_that_of_a_saved_input(name, method, dtype, monkeypatch):
    torch.manual_seed(0)
    model = Block(ACTIVATIONS[name]).to(dtype)
    found = []
    monkeypatch.setattr(linear, "again", lambda node: found.append(node.name()) or again(node))
    method = unmask.id3(100, steps=4) if method == "id3" else None

    def backward(model):
        model(X.to(dtype)).square().sum().backward()

    assert torch.equal(*(gradient(model, backward, on, monkeypatch, method) for on in (True, False)))
    assert len(found) == (name != "scaled")  # A number is not saved as a tensor.


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(name, reentrant, monkeypatch):
    model = Block(ACTIVATIONS[name]).train()

    def backward(model):
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()

    torch.testing.assert_close(*(gradient(model, backward, on, monkeypatch) for on in (True, False)))


def test_hooks_of_saved_tensors_see_every_input():
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert origin(F.gelu(X.clone().requires_grad_())) is None
    assert origin(F.gelu(X.clone().requires_grad_())) is not None


@pytest.mark.parametrize("backwards", [1, 2])
def test_a_retained_graph(backwards, monkeypatch):
    model = Block(F.gelu)

    def backward(model):
        value = model(X).square().sum()
        for left in reversed(range(backwards)):
            value.backward(retain_graph=left > 0)

    assert torch.equal(*(gradient(model, backward, on, monkeypatch) for on in (True, False)))


def test_a_gradient_penalty(monkeypatch):
    model = Block(F.gelu).double()

    def backward(model):
        x = X.double().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()

    on, off = (gradient(model, backward, on, monkeypatch) for on in (True, False))
    dense = copy.deepcopy(model)
    selection = unmask.select(dense, unmask.random_mask("50%", seed=1), gradients="dense")
    backward(dense)
    torch.testing.assert_close(on, off)
    torch.testing.assert_close(on, selection.values.grad)


def test_an_activation_that_was_changed_in_place_is_saved():
    x = F.gelu(X.clone().requires_grad_())
    for change in (lambda: x.mul_(2), lambda: x.add_(1), lambda: x[0].zero_()):
        change()
        assert origin(x) is None
    x.mul_(torch.full_like(x, 2.0, requires_grad=True))
    made = origin(x)  # It is a product of two tensors now, which can be made again.
    assert made is not None
    assert torch.equal(again(made), x)


def test_an_activations_input_that_was_changed_is_refused():
    model = Block(F.gelu)
    unmask.select(model, unmask.random_mask("50%"), gradients="sampled")
    hidden = model.up(X)
    value = model.down(F.gelu(hidden)).sum()
    with torch.no_grad():
        hidden.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.usefixtures("how")
def test_the_output_of_an_activation_is_not_kept():
    model = Block(F.gelu)
    unmask.select(model, unmask.random_mask("50%"), gradients="sampled")
    hidden = model.up(X)
    value = model.down(F.gelu(hidden)).sum()
    node = value.grad_fn.next_functions[0][0]
    kept = [t for t in node.saved_tensors if t is not None]
    assert node.name() == "SampledLinearBackward"
    assert all(t.shape != (6, 64) for t in kept)
    value.backward()
