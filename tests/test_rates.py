"""A learning rate per slot: by how many share its row and column, and by its age."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import unmask
from helpers import assert_same_tensors, snapshot, train
from optim_runs import BETAS, BOTH, DOUBLE, EPS, LR, METHODS, begin, data, square
from unmask import ConfigError, SelectiveAdamW
from unmask.rates import row_column_scale
from unmask.slots import Layout


def counted(selection, model):
    """The scale of every slot by plain counting."""
    masks = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    for name, flat in selection.indices.items():
        masks[name].view(-1)[flat] = 1
    scale = torch.ones(selection.values.numel(), dtype=selection.values.dtype)
    for slot, position in enumerate(selection._table.positions[: selection.used].tolist()):
        index = int(torch.searchsorted(selection._layout.bounds, position, right=True)) - 1
        mask = masks[selection._layout.names[index]]
        flat = position - selection._layout.starts[index]
        rows = mask.view(mask.shape[0], -1) if mask.ndim > 1 else mask.view(1, -1)
        i, j = divmod(flat, rows.shape[1])
        scale[slot] = 1 / math.sqrt(rows[i].sum() * rows[:, j].sum())
    return scale


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"] + ["regrow"])
def test_the_scale_counts_what_the_coming_step_trains(method, monkeypatch):
    monkeypatch.setitem(METHODS, "regrow", lambda: unmask.regrow(101, 20, drop=0.5, stride=3))
    model, selection, optimizer = begin(method)
    for x in data(8):
        square(model, x).backward()
        coming = selection.slot_scale().clone()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(coming, counted(selection, model))
        if method in ("pafi", "regrow"):
            assert torch.equal(coming, selection.slot_scale()) or selection.method.drop


@pytest.mark.parametrize("seed", range(5))
def test_an_update_has_a_spectral_norm_of_at_most_lr(seed):
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(["w"], [torch.zeros(30, 20)])
    density = torch.rand(30, 1, generator=generator) * torch.rand(1, 20, generator=generator) ** 3
    positions = (torch.rand(30, 20, generator=generator) < density).view(-1).nonzero().squeeze(1)
    update = torch.zeros(600).index_put((positions,), row_column_scale(layout, positions)).view(30, 20)
    assert torch.linalg.matrix_norm(update, 2) == pytest.approx(1.0, abs=1e-5)  # the worst signs, all alike
    full = row_column_scale(layout, torch.arange(600))
    assert torch.allclose(full, torch.tensor(1 / math.sqrt(600)))


class Naive:
    """Adam on every slot by itself, in plain Python, with a rate of its own."""

    def __init__(self, entry, scaled, warmup, weight_decay):
        self.entry, self.scaled, self.warmup, self.weight_decay = entry, scaled, warmup, weight_decay
        self.states, self.t = {}, 0

    def step(self, values, gradient, scale, slots):
        self.t += 1
        out = values.clone()
        for slot in slots:
            state = self.states.setdefault(slot, [0, 0.0, 0.0])
            state[0] += 1
            t, g = state[0] if self.entry else self.t, gradient[slot].item()
            state[1] = BETAS[0] * state[1] + (1 - BETAS[0]) * g
            state[2] = BETAS[1] * state[2] + (1 - BETAS[1]) * g * g
            m, v = state[1] / (1 - BETAS[0] ** t), state[2] / (1 - BETAS[1] ** t)
            lr = LR * (scale[slot].item() if self.scaled else 1.0) * (min(1.0, t / self.warmup) if self.warmup else 1.0)
            out[slot] = values[slot] * (1 - lr * self.weight_decay) - lr * m / (math.sqrt(v) + EPS)
        return out


SETTINGS = {
    "global-scaled": {"lr_scale": "row-column"},
    "entry-scaled": {"lr_scale": "row-column", "bias_correction": "entry"},
    "entry-warmup": {"slot_warmup": 4, "bias_correction": "entry"},
    "entry-both": {"lr_scale": "row-column", "slot_warmup": 4, "bias_correction": "entry"},
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_slot_steps_as_adam_with_a_rate_of_its_own(settings, weight_decay):
    chosen = SETTINGS[settings]
    model, selection, optimizer = begin("id3_strided", DOUBLE, weight_decay=weight_decay, **chosen)
    naive = Naive("bias_correction" in chosen, "lr_scale" in chosen, chosen.get("slot_warmup"), weight_decay)
    for x in data(12, DOUBLE):
        square(model, x).backward()
        scale, slots = selection.slot_scale(), range(selection.in_use)
        expected = naive.step(selection.values.detach(), selection.values.grad, scale, slots)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(selection.values.detach(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", ["id3", "repeat_d3_strided"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(settings, method):
    straight, _, optimizer = begin(method, **SETTINGS[settings])
    train(straight, optimizer, data(10))
    first, selection, before = begin(method, **SETTINGS[settings])
    train(first, before, data(4))
    second, resumed, after = begin(method, **SETTINGS[settings])
    resumed.load_state_dict(selection.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(second, after, data(10)[4:])
    assert_same_tensors(snapshot(straight), snapshot(second))


def test_going_back_within_one_run_counts_anew():
    model, selection, optimizer = begin("id3", lr_scale="row-column")
    train(model, optimizer, data(3))
    saved, state = selection.state_dict(), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, data(8)[3:])
    late = snapshot(model)
    selection.load_state_dict(saved)
    optimizer.load_state_dict(state)
    torch.testing.assert_close(selection.slot_scale()[: selection.used], counted(selection, model)[: selection.used])
    train(model, optimizer, data(8)[3:])
    assert_same_tensors(late, snapshot(model))


@BOTH
def test_dense_tensors_and_parameters_of_no_selection_have_lr_itself(bias_correction):
    settings = {"bias_correction": bias_correction, "weight_decay": 0.1}
    plain, scaled = (begin("pafi", lr_scale=kind, **settings) for kind in ("none", "row-column"))
    for model, _, optimizer in (plain, scaled):
        train(model, optimizer, data(1))
    for name in ("4.weight", "4.bias"):
        assert torch.equal(plain[0].get_parameter(name), scaled[0].get_parameter(name))
    assert not torch.equal(plain[1].values, scaled[1].values)
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    for p, kind in zip(parameters, ("none", "row-column"), strict=True):
        p.grad = torch.arange(3.0)
        SelectiveAdamW([p], lr_scale=kind, **settings).step()
    assert torch.equal(*parameters)


def test_a_state_of_other_rates_is_refused():
    model, selection, optimizer = begin("id3", lr_scale="row-column")
    train(model, optimizer, data(2))
    with pytest.raises(ConfigError, match="lr_scale = 'row-column', this optimizer has 'none'"):
        SelectiveAdamW(selection.parameters()).load_state_dict(optimizer.state_dict())
    with pytest.raises(ConfigError, match="lr_scale = 'none', this optimizer has 'row-column'"):
        optimizer.load_state_dict(torch.optim.AdamW(selection.parameters()).state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scale": "row"},
        {"lr_scale": None},
        {"slot_warmup": -1},
        {"slot_warmup": 2.5},
        {"slot_warmup": True},
        {"slot_warmup": 3, "bias_correction": "global"},
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(settings):
    settings = {"bias_correction": "entry"} | settings
    with pytest.raises(ConfigError, match=r"(lr_scale|slot_warmup) = .*must be"):
        SelectiveAdamW([nn.Parameter(torch.ones(3))], **settings)
