"""Checks that leaving tokens without gradient out of a linear layer's backward changes nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unmask
from unmask.gradients import linear
from unmask.gradients.linear import LEAST, live_rows, spread_rows


def at(*places, tokens=256, width=40, column=33):
    g = torch.zeros(tokens, width)
    g[list(places), column] = 1e-30
    return g


def test_rows_with_one_small_value_in_a_late_column_are_live():
    assert live_rows(at(0, 128, 255)).tolist() == [0, 128, 255]
    assert live_rows(at(5, column=0)).tolist() == [5]


def test_all_rows_zero():
    assert live_rows(at()).tolist() == []


def test_nan_and_infinity_are_live():
    g = at(9)
    g[3, 2], g[4, 30] = torch.nan, torch.inf
    assert live_rows(g).tolist() == [3, 4, 9]


@pytest.mark.parametrize("tokens", [1, LEAST - 1])
def test_few_tokens_are_left_alone(tokens):
    assert live_rows(torch.zeros(tokens, 8)) is None


def test_zero_rows_that_would_not_pay_are_left_alone():
    g = torch.ones(1000, 20)
    g[:149] = 0
    assert live_rows(g) is None
    g[:150] = 0
    assert live_rows(g).tolist() == list(range(150, 1000))


def test_zeros_in_the_columns_that_are_probed_do_not_make_a_row_zero():
    g = torch.ones(256, 20)
    g[:, :16] = 0
    assert live_rows(g) is None


def test_every_place_of_a_sequence_is_sampled():
    for place in range(0, 105, 8):  # 24 tokens of each 128 are padding, the last ones or others.
        g = torch.ones(16, 128, 8)
        g[:, place : place + 24] = 0
        assert live_rows(g.view(-1, 8)) is not None


def test_no_columns():
    assert live_rows(torch.zeros(100, 0)) is None


def test_spread_rows():
    assert spread_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 2]), 4).tolist() == [[1], [0], [2], [0]]


class Pooled(nn.Module):
    """Has two layers over tokens; a loss may see a few of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


METHODS = {
    "static": unmask.random_mask("20%", seed=1),
    "id3": unmask.id3("20%", steps=6),
    "stride": unmask.id3("20%", steps=6, stride=3),
}


def trained(method, gradients, autocast):
    torch.manual_seed(0)
    model = Pooled() if autocast else Pooled().double()
    selection = unmask.select(model, method, gradients=gradients)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2, eps=1e-3)
    inputs = []
    for step in range(6):
        x = torch.randn(8, 32, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        x = (x.float() if autocast else x).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(x)
        (out[:, 0].float().pow(2).sum() + 0 * out.float().sum()).backward()
        inputs.append(x.grad)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()], inputs


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_leaves_tokens_out_is_the_run_that_does_not(method, autocast, monkeypatch):
    monkeypatch.setattr(linear, "choose", lambda *args, **options: "sampled")
    left_out = []

    def seen(g):
        live = live_rows(g)
        left_out.append(0 if live is None else len(g) - len(live))
        return live

    monkeypatch.setattr(linear, "live_rows", seen)
    short = trained(METHODS[method], "auto", autocast)
    assert max(left_out) == 8 * 31
    monkeypatch.setattr(linear, "live_rows", lambda g: None)
    whole = trained(METHODS[method], "auto", autocast)
    dense = trained(METHODS[method], "dense", autocast)
    rtol, atol = (2e-2, 1e-3) if autocast else (1e-9, 1e-12)
    for ours, other, reference in zip(
        (*short[0], *short[1]), (*whole[0], *whole[1]), (*dense[0], *dense[1]), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=rtol, atol=atol)
        torch.testing.assert_close(ours, reference, rtol=rtol, atol=atol)


def test_second_derivatives_through_a_weight_of_which_nothing_is_wanted(monkeypatch):
    torch.manual_seed(0)
    model, calls = Pooled().double(), []
    twice = linear._differentiable
    monkeypatch.setattr(linear, "_differentiable", lambda *args: calls.append(args[0].setup.stand_in) or twice(*args))
    with torch.no_grad():
        model.first.weight.mul_(1e3)  # Its D3 scores are small now, and those of the other weight large.
    selection = unmask.select(model, unmask.id3(8, steps=8, stride=4))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    x = torch.randn(4, 32, 12, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    reference = Pooled().double()
    reference.load_state_dict(model.state_dict())
    grads = []
    for net in (model, reference):
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(inputs).pow(2).sum(), inputs, create_graph=True)
        (again,) = torch.autograd.grad(slope.pow(2).sum(), inputs)
        grads.append((slope, again))
    assert None in calls  # A weight whose gradient is not wanted has no stand-in.
    torch.testing.assert_close(grads[0], grads[1])


def test_the_share_and_the_least_are_what_the_docs_say():
    assert (linear.LEAST, linear.SHARE) == (64, 0.85)
