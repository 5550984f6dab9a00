"""Checks that the selection sees the gradient that autograd would give, in every kind of module."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import as_lists, d3_scores, dense_gradients, first_k, gradient_at_slots, mean_square, mlp
from layer_nets import CASES, Called, X, loss_of
from torch import nn

import unmask


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_gradient_at_the_slots_is_the_dense_gradient(case, training):
    build, x = CASES[case]
    model = build().train(training)
    dense = dense_gradients(model, lambda m: loss_of(m, x))
    selection = unmask.select(model, unmask.random_mask(budget="100%"))
    loss_of(model, x).backward()
    torch.testing.assert_close(selection.values.grad, gradient_at_slots(selection, dense), rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:step 0 was to select:unmask.UnmaskWarning")  # rows that no token has seen
@pytest.mark.parametrize("case", CASES)
def test_the_selection_is_a_sort_of_the_dense_scores(case):
    build, x = CASES[case]
    model = build()
    dense = dense_gradients(model, lambda m: loss_of(m, x))
    numel = sum(p.numel() for p in model.parameters())
    for budget in {1, numel // 3 or 1, numel - 1 or 1}:
        twin = copy.deepcopy(model)
        expected = first_k(d3_scores(twin, dense), budget, above=0.0)
        selection = unmask.select(twin, unmask.static_d3(budget=budget))
        loss_of(twin, x).backward()
        torch.optim.SGD(selection.parameters(), lr=0.1).step()
        assert as_lists(selection.indices) == expected


@pytest.mark.parametrize("case", CASES)
def test_selected_weights_move_by_their_own_gradient_and_no_others_move(case):
    build, x = CASES[case]
    model = build()
    dense, before = dense_gradients(model, lambda m: loss_of(m, x)), copy.deepcopy(model)
    selection = unmask.select(model, unmask.random_mask(budget="40%", seed=1))
    loss_of(model, x).backward()
    torch.optim.SGD(selection.parameters(), lr=0.1).step()
    for name, p in model.named_parameters():
        expected = before.get_parameter(name).detach().clone().contiguous()
        flat = selection.indices.get(name, torch.empty(0, dtype=torch.int64))
        expected.view(-1)[flat] -= 0.1 * dense[name].reshape(-1)[flat]
        torch.testing.assert_close(p.detach().contiguous(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["candidates", "exact"])
def test_dense_gradients_are_received_one_by_one_and_freed(mode):
    """Checks that a layer's gradients are freed before the next layer's are formed, in every micro-batch."""
    model = mlp(width=16, depth=12)
    selection = unmask.select(model, unmask.id3(budget=50, steps=2), accumulation=mode)
    receive, alive, behind, most = selection._window.receive, [], set(), []

    def reach(layer):
        def hook(module, inputs, output):
            output.register_hook(lambda gradient: behind.update({f"{layer}.weight", f"{layer}.bias"}))

        return hook

    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(reach(name))

    def counting(index, gradient):
        most.append(len(behind))
        behind.discard(selection.ledger.layout.names[index])
        alive.append(weakref.ref(gradient))
        receive(index, gradient)
        assert sum(ref() is not None for ref in alive) == 1

    selection._window.receive = counting
    for _ in range(3):
        mean_square(model, torch.randn(3, 16)).backward()
    assert len(most) == 3 * 24
    assert max(most) <= 3  # This is one layer's, and the part of the next that autograd has just formed.
    assert not behind


@pytest.mark.parametrize("mode", ["candidates", "exact"])
def test_tensors_that_the_loss_does_not_reach_have_a_zero_gradient_and_wait_for_one(mode):
    model = nn.ModuleDict({"used": nn.Linear(6, 2), "unused": nn.Linear(6, 2)})
    selection = unmask.select(model, unmask.static_d3(20), accumulation=mode)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    loss_of(model["used"], X).backward()
    with pytest.warns(unmask.UnmaskWarning, match="to select 20 weights and selected 14"):
        optimizer.step()
    assert as_lists(selection.indices) == {"used.bias": [0, 1], "used.weight": [*range(12)]}
    optimizer.zero_grad()
    loss_of(model["unused"], X).backward()
    optimizer.step()
    assert selection.used == 20
    assert sum(len(flat) for name, flat in selection.indices.items() if name.startswith("unused")) == 6


def test_a_tensor_of_several_uses_is_received_once_with_their_sum():
    model, seen = Called(), []
    selection = unmask.select(model, unmask.id3(budget=5, steps=1))
    receive = selection._window.receive
    selection._window.receive = lambda index, gradient: (seen.append(index), receive(index, gradient))
    loss_of(model, X).backward()
    assert sorted(seen) == [0, 1]


def test_a_step_without_newcomers_asks_for_no_gradient_of_tensors_without_slots():
    model = mlp(depth=2)
    selection = unmask.select(model, unmask.bitfit(), include=r"^0\.")
    inputs = torch.randn(2, 6)
    out = mean_square(model, inputs)
    sites = [p.__dict__["_unmask_site"] for p in selection.ledger.layout.tensors]
    assert [site.part is not None for site in sites] == [True]
    out.backward()
    assert selection.values.grad.abs().sum() > 0


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight**2

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight**2, (2 * gradient * x * weight).sum(0)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return Square.apply(x, self.weight) + self.bias


def test_limitation_a_custom_autograd_function_hides_its_tensors_gradient():
    """Shows that Function.apply avoids __torch_function__, so that such a tensor counts as one that the loss does not reach."""
    model = Custom()
    selection = unmask.select(model, unmask.static_d3(budget=6))
    model(X).sum().backward()
    torch.optim.SGD(selection.parameters(), lr=0.1).step()
    assert list(selection.indices) == ["bias"]


def test_a_custom_autograd_function_works_on_a_view_of_the_tensor():
    """Shows how to avoid that limitation: any operation on the tensor comes first, such as ``weight.view_as(weight)``."""
    model = Custom()
    model.forward = lambda x: Square.apply(x, model.weight.view_as(model.weight)) + model.bias
    selection = unmask.select(model, unmask.random_mask(budget=12))
    dense = {"weight": (2 * X * model.weight.detach()).sum(0), "bias": torch.full((6,), 4.0)}
    model(X).sum().backward()
    torch.testing.assert_close(selection.values.grad, gradient_at_slots(selection, dense))
