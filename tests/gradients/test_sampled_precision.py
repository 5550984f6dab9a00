"""Checks sampled linear operations in every precision and shape: equal outputs, gradients exact to float32."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from helpers import assert_unselected_is_base, snapshot
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import unmask
from unmask.gradients import linear

HALF = [torch.bfloat16, torch.float16]
SHAPES = [(20,), (9, 20), (3, 5, 20), (2, 3, 4, 20), (2, 0, 20), (1, 1, 20), (300, 20)]


@pytest.fixture(params=["compact", "sampled"], autouse=True)
def how(request, monkeypatch):
    monkeypatch.setattr(linear, "choose", lambda *args, **options: request.param)
    return request.param


def layer(kind=nn.Linear, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    if kind is Conv1D:
        return Conv1D(12, 20).to(dtype)
    return nn.Linear(20, 12, bias=bias).to(dtype)


def selected(model, gradients="sampled", budget="40%"):
    return unmask.select(model, unmask.random_mask(budget, seed=4), gradients=gradients)


def autocast(dtype):
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def exact(selection, g, x, transposed):
    """Returns the gradient at the slots, computed in float64."""
    g, x = g.double().reshape(-1, g.shape[-1]), x.double().reshape(-1, x.shape[-1])
    whole = {"weight": x.t() @ g if transposed else g.t() @ x, "bias": g.sum(0)}
    flat = torch.cat([whole[name].reshape(-1) for name in selection.ledger.layout.names])
    return flat[selection.ledger.positions]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("needs", [False, True], ids=["data", "hidden"])
def test_one_layer_in_any_shape_and_dtype(kind, dtype, shape, needs, how):
    model = layer(kind, dtype)
    plain = copy.deepcopy(model)
    selection = selected(model)
    x, twin = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(needs) for _ in "12"
    )
    if len(shape) == 1 and kind is Conv1D:
        pytest.skip("a Conv1D wants a batch")
    out, expected = model(x), plain(twin)
    g = torch.randn(out.shape).to(dtype)
    out.backward(g)
    if needs:
        expected.backward(g)
        torch.testing.assert_close(x.grad, twin.grad, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    if len(shape) == 1:
        torch.testing.assert_close(out, expected)
    else:
        assert torch.equal(out, expected)
    rounding = dtype if how == "compact" and dtype in HALF else selection.values.dtype
    wanted = exact(selection, g, x.detach(), kind is Conv1D).to(selection.values.dtype)
    eps = torch.finfo(rounding).eps
    torch.testing.assert_close(selection.values.grad, wanted, rtol=20 * eps, atol=60 * eps)
    assert x.numel() == 0 or wanted.abs().sum() > 0


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_autocast_of_one_layer(given, dtype, shape, bias, how):
    model = layer(bias=bias)
    plain = copy.deepcopy(model).requires_grad_(True)
    selection = selected(model)
    x, twin = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(given).requires_grad_() for _ in "12")
    with autocast(dtype):
        out, expected = model(x), plain(twin)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    g = torch.randn(out.shape).to(dtype)
    out.backward(g)
    expected.backward(g)
    assert x.grad.dtype == given
    assert torch.equal(x.grad, twin.grad)
    eps = torch.finfo(dtype if how == "compact" else torch.float32).eps
    wanted = exact(selection, g, x.detach().to(dtype), False).float()
    names = selection.ledger.layout.names  # The bias is summed in float32 in both ways.
    assert selection.values.grad.shape == wanted.shape
    assert names == (["bias", "weight"] if bias else ["weight"])
    torch.testing.assert_close(selection.values.grad, wanted, rtol=20 * eps, atol=60 * eps)


class Net(nn.Module):
    """Has query, key and value of one input, and inputs that autocast need not convert."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 20)
        self.query, self.key, self.value = (nn.Linear(20, 20) for _ in range(3))
        self.out = Conv1D(20, 20)
        self.norm = nn.LayerNorm(20)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        attention = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        x = x + self.out(attention @ self.value(x)).relu_()
        return (self.norm(x) @ self.embed.weight.t()).float()


def ids_of(step):
    return torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(step))


def loss_of(model, ids):
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flip(1).flatten())


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("dtype", [None, *HALF], ids=str)
def test_autocast_of_a_network(dtype, inside):
    torch.manual_seed(0)
    model = Net()
    results = []
    for gradients in ("dense", "sampled"):
        twin = copy.deepcopy(model)
        selection = selected(twin, gradients)
        with autocast(dtype):
            loss = loss_of(twin, ids_of(0))
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append((loss.detach(), selection.values.grad))
    (dense_loss, dense), (sampled_loss, sampled) = results
    assert torch.equal(dense_loss, sampled_loss)
    tolerance = 1e-5 if dtype is None else 4 * torch.finfo(dtype).eps
    assert (dense - sampled).norm() <= tolerance * dense.norm()
    assert sampled.norm() > 0


@pytest.mark.parametrize("method", [unmask.random_mask(300), unmask.id3(300, steps=4, stride=2)], ids=lambda m: m.name)
def test_a_scaler_under_float16_autocast_skips_an_overflow_and_trains(method):
    results = []
    for gradients in ("dense", "sampled"):
        torch.manual_seed(0)
        model = Net()
        base = snapshot(model)
        selection = unmask.select(model, method, gradients=gradients)
        optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2, eps=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
        for step in range(6):
            with autocast(torch.float16):
                loss = loss_of(model, ids_of(step))
            skipped = step == 3
            scaler.scale(loss * (math.inf if skipped else 1.0)).backward()
            before = selection.step
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert selection.step == before + (not skipped)
            assert_unselected_is_base(model, base, selection)
        assert scaler.get_scale() == 2.0**7
        results.append(selection.values.detach())
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-3)


def test_an_input_that_changes_between_two_layers_is_converted_again():
    """Checks that query, key and value share a conversion, and that a changed input is converted again."""
    model = nn.ModuleList([layer(bias=False), layer(bias=False)])
    selection = selected(model, budget="100%")
    x = torch.randn(5, 20)
    with autocast(torch.bfloat16):
        first = model[0](x)
        x.mul_(3)
        second = model[1](x)
    torch.testing.assert_close(second, 3 * first, rtol=2e-2, atol=1e-2)
    (first.sum() + second.sum()).backward()
    halves = selection.values.grad[selection.ledger.positions.argsort()].view(2, -1)  # Slots are in order of rank.
    torch.testing.assert_close(halves[1], 3 * halves[0], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x[0].zero_(), lambda x: x.view(-1)[3:5].add_(1)])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_an_input_changed_after_the_forward_is_refused(kind, change):
    model = layer(kind)
    selection, x = selected(model), torch.randn(4, 20)
    loss = model(x).square().sum()
    change(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert selection.values.grad is None
    model(x).square().sum().backward()
    assert selection.values.grad.abs().sum() > 0


def test_ids_changed_after_the_forward_are_refused():
    model, ids = nn.Embedding(30, 4), torch.tensor([1, 2, 3])
    selected(model)
    loss = model(ids).square().sum()
    ids.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize(
    "change", [F.relu_, lambda out: out.mul_(2), lambda out: out[0].zero_(), lambda out: out.view(-1)[::2].neg_()],
    ids=["relu_", "mul_", "part", "view"],
)  # fmt: skip
def test_an_output_may_be_changed_in_place(shape, change):
    model, results = layer(), []
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for gradients in ("dense", "sampled"):
        twin = copy.deepcopy(model)
        selection = selected(twin, gradients)
        out = twin(x)
        changed = change(out)
        (out if changed is None or changed.shape != out.shape else changed).square().sum().backward()
        results.append((selection.values.grad, x.grad))
        x.grad = None
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_an_input_from_inference_mode_works_under_autocast():
    model = layer()
    selection = selected(model)
    with torch.inference_mode():
        x = torch.randn(5, 20)
    for _ in range(2):
        with autocast(torch.bfloat16):
            out = model(x)
        out.sum().backward()
    wanted = exact(selection, torch.ones(5, 12), x.clone().bfloat16(), False).float()
    torch.testing.assert_close(selection.values.grad, 2 * wanted, rtol=2e-2, atol=2e-2)
