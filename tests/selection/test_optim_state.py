"""Tests how `SelectiveAdamW` is saved and copied, how it skips, and which settings it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from helpers import assert_same_tensors, mean_square, snapshot, train
from optim_runs import BOTH, CASES, assert_same_state, begin, data, fused
from torch import nn

from unmask import ConfigError, SelectionError, SelectiveAdamW

# Saving, copying, skipping.


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@BOTH
@CASES
def test_only_a_correction_by_entry_keeps_ages(method, dtype, bias_correction):
    model, selection, optimizer = begin(method, dtype, bias_correction=bias_correction)
    train(model, optimizer, data(1, dtype))
    assert ("age" in optimizer.state[selection.values]) == (bias_correction == "entry" and method != "full")


def test_ages_up_to_2_to_the_24_survive_a_file_and_go_no_further():
    model, selection, optimizer = begin("pafi", bias_correction="entry")
    train(model, optimizer, data(1))
    ages = torch.tensor([1.0, 255, 256, 257, 65_535, 2**24 - 1, 2**24]).repeat(15)[:101]
    optimizer.state[selection.values]["age"].copy_(ages)
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    assert torch.equal(optimizer.state[selection.values]["age"], ages)
    train(model, optimizer, data(2)[1:])
    assert torch.equal(optimizer.state[selection.values]["age"], (ages + 1).clamp(max=2**24))
    assert selection.values.isfinite().all()


def test_a_run_begun_with_torchs_adamw_goes_on_under_global_and_not_under_entry():
    straight, _, optimizer = begin("id3", make=fused)
    train(straight, optimizer, data(9))
    model, selection, optimizer = begin("id3", make=fused)
    train(model, optimizer, data(9)[:4])
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError, match="made with bias_correction = 'global', this optimizer has 'entry'"):
        SelectiveAdamW(selection.parameters(), bias_correction="entry").load_state_dict(state)
    optimizer = SelectiveAdamW(selection.parameters())
    optimizer.load_state_dict(state)
    train(model, optimizer, data(9)[4:])
    assert_same_tensors(snapshot(straight), snapshot(model))


def test_a_state_of_the_other_correction_is_refused_and_nothing_is_changed():
    model, selection, optimizer = begin("id3", bias_correction="entry")
    train(model, optimizer, data(2))
    other = SelectiveAdamW(selection.parameters(), lr=0.5)
    with pytest.raises(ConfigError, match="build it with bias_correction='entry'"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    assert other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@BOTH
def test_a_copy_steps_like_the_original_once_every_slot_is_in_use(copied, bias_correction):
    model, selection, optimizer = begin("id3", dense=None, bias_correction=bias_correction)
    train(model, optimizer, data(21))
    twin = copied(optimizer)
    (values,) = twin.param_groups[0]["params"]
    assert values is not selection.values
    mean_square(model, data(22)[21]).backward()
    values.grad = selection.values.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(values, selection.values)
    for name, tensor in optimizer.state[selection.values].items():
        assert torch.equal(twin.state[values][name], tensor), name


@BOTH
def test_a_step_that_a_grad_scaler_skips_increases_no_age(bias_correction):
    runs = []
    for poisoned in (False, True):
        model, selection, optimizer = begin("id3", bias_correction=bias_correction)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**9, backoff_factor=0.5)
        for t, x in enumerate(data(6)):
            for batch in ([x * torch.inf] if poisoned and t == 3 else []) + [x]:
                scaler.scale(mean_square(model, batch)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert selection.step == 6
        runs.append((model, optimizer.state[selection.values]))
    assert_same_tensors(snapshot(runs[0][0]), snapshot(runs[1][0]))
    assert_same_tensors(runs[0][1], runs[1][1])


@BOTH
def test_a_closure_runs_once_in_grad_mode_and_its_loss_comes_back(bias_correction):
    (plain, _, first), (model, _, second) = (begin("repeat_d3", bias_correction=bias_correction) for _ in range(2))
    for x in data(5):

        def closure(x=x):
            second.zero_grad()
            loss = mean_square(model, x)
            loss.backward()
            return loss

        expected = mean_square(plain, x).item()
        train(plain, first, [x])
        assert second.step(closure).item() == expected
    assert_same_tensors(snapshot(plain), snapshot(model))


def test_parameters_without_a_gradient_are_left_out():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SelectiveAdamW([p, q])
    p.grad = torch.ones(3)
    assert optimizer.step() is None
    assert torch.equal(q, torch.ones(3))
    assert q not in optimizer.state
    optimizer.zero_grad()
    assert p.grad is None


# Settings that cannot work.

REFUSED = {
    "lr": (-1.0, math.nan, math.inf, "fast", torch.tensor(0.1)),
    "weight_decay": (-0.1, None),
    "eps": (0.0, -1e-8),
    "betas": (0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, "x"), (0.9, math.nan)),
    "bias_correction": ("slot", None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_setting_that_cannot_work_is_refused_by_name(name, value):
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=rf"^{name} = .*must be"):
        SelectiveAdamW([parameter], **{name: value})
    optimizer = SelectiveAdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=f"^{name} = "):
        optimizer.add_param_group({"params": [parameter], name: value})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused():
    optimizer = SelectiveAdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ConfigError, match="complex64; SelectiveAdamW trains real ones"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@BOTH
def test_sparse_gradients_are_refused(bias_correction):
    layer = nn.Embedding(5, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    optimizer = SelectiveAdamW(layer.parameters(), bias_correction=bias_correction)
    with pytest.raises(SelectionError, match=r"shape \(5, 2\).*sparse=False"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize(("name", "usual", "used"), [("lr_scale", "none", "row-column"), ("slot_warmup", 0, 4)])
def test_a_state_with_a_retired_setting_loads_only_where_the_setting_changed_nothing(name, usual, used):
    model, selection, optimizer = begin("id3")
    train(model, optimizer, data(2))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group[name] = usual
    fresh = SelectiveAdamW(selection.parameters())
    fresh.load_state_dict(state)
    assert_same_state(fresh, optimizer)
    for group in state["param_groups"]:
        group[name] = used
    with pytest.raises(ConfigError, match=f"made with {name} = {used!r}, a setting that SelectiveAdamW no longer has"):
        SelectiveAdamW(selection.parameters()).load_state_dict(state)
