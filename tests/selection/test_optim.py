"""Tests that `SelectiveAdamW` is torch's AdamW under "global", and Adam with a step counter per weight under "entry"."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import assert_same_tensors, batches, dense_gradients, first_k, mean_square, mlp, snapshot, train
from optim_runs import BETAS, BOTH, CASES, DOUBLE, EPS, LR, METHODS, assert_same_state, begin, data, fused, square
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import unmask
from unmask import SelectiveAdamW
from unmask.selection import optim
from unmask.selection.stepping import slots_in_use

# Global: torch's own AdamW.


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@CASES
def test_global_is_bitwise_torchs_fused_adamw(method, dtype, weight_decay):
    runs = [begin(method, dtype, make, weight_decay=weight_decay) for make in (fused, SelectiveAdamW)]
    for model, selection, optimizer in runs:
        # The rate is 0 on steps 0, 5, 10 ...
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t % 5) / 4)
        for x in data(23, dtype):
            train(model, optimizer, [x])
            schedule.step()
        assert selection.step == 23
    assert_same_tensors(snapshot(runs[0][0]), snapshot(runs[1][0]))
    assert torch.equal(runs[0][1].values, runs[1][1].values)
    assert_same_state(runs[0][2], runs[1][2])


@BOTH
def test_parameters_of_no_selection_train_as_under_torchs_plain_adamw_for_any_strides(bias_correction):
    def parameters():
        turned = nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).t())
        return [turned, nn.Parameter(torch.ones(5, 7, dtype=DOUBLE)), nn.Parameter(torch.tensor(1.5, dtype=DOUBLE))]

    groups = [parameters(), parameters()]
    kinds = (torch.optim.AdamW, lambda p, **k: SelectiveAdamW(p, bias_correction=bias_correction, **k))
    optimizers = [make(group, lr=0.1, weight_decay=0.1) for make, group in zip(kinds, groups, strict=True)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(9):
        gradient = torch.randn(7, 5, generator=generator, dtype=DOUBLE).t()  # it is not contiguous
        for group, optimizer in zip(groups, optimizers, strict=True):
            for p in group:
                p.grad = gradient.clone() if p.ndim else gradient.sum()
            group[1].grad = gradient  # the gradient is column-major, the parameter row-major
            optimizer.step()
    for p, q in zip(*groups, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


def test_a_device_without_a_fused_kernel_gets_torchs_other_adamw(monkeypatch):
    monkeypatch.setattr(optim, "_FUSED", ())
    runs = [begin("id3", DOUBLE, make, weight_decay=0.1)[::2] for make in (torch.optim.AdamW, SelectiveAdamW)]
    for model, optimizer in runs:
        train(model, optimizer, data(9, DOUBLE), square)
    torch.testing.assert_close(*(snapshot(model) for model, _ in runs), rtol=1e-12, atol=1e-14)


def test_groups_have_separate_settings_and_schedulers_change_them():
    runs = []
    for make in (fused, SelectiveAdamW):
        model, selection, _ = begin("id3")
        values, *dense = selection.parameters()
        groups = [
            {"params": [values], "lr": 0.1, "weight_decay": 0.3, "eps": 1e-6},
            {"params": dense, "betas": (0.8, 0.9)},
        ]
        optimizer = make(groups, lr=0.01)
        # This schedule cycles b1 too.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.2, 0.02], total_steps=20)
        for x in data(12):
            train(model, optimizer, [x])
            schedule.step()
        runs.append(model)
    assert_same_tensors(*map(snapshot, runs))


def test_bias_correction_may_differ_between_groups():
    _, selection, _ = begin("id3")
    values, *dense = selection.parameters()
    optimizer = SelectiveAdamW([{"params": [values], "bias_correction": "entry"}, {"params": dense}])
    train(selection.model, optimizer, data(2))
    assert "age" in optimizer.state[values]
    assert all("age" not in optimizer.state[p] for p in dense)


# Entry. The reference is Adam with a step counter per weight, in plain Python.


class Naive:
    """Steps each weight separately, finds the mask by a full sort, and takes gradients by autograd on an ordinary copy."""

    def __init__(self, model, method, weight_decay):
        self.model, self.method, self.weight_decay = copy.deepcopy(model), method, weight_decay
        self.base, self.held, self.t = snapshot(model), {}, 0  # held: (name, flat index) -> [age, m, v]

    def step(self, x):
        gradients = dense_gradients(self.model, lambda m: square(m, x))
        self._select(gradients)
        for (name, i), adam in self.held.items():
            flat, g = self.model.get_parameter(name).detach().view(-1), gradients[name].view(-1)[i].item()
            flat[i] = _adamw(flat[i].item(), g, adam, self.weight_decay)
        self.t += 1

    def _select(self, gradients):
        method, taken = self.method, {}
        scores = {n: gradients[n].abs() / (p.detach().abs() + 1) ** 2 for n, p in self.model.named_parameters()}
        if method.strategy == "repeat":
            if self.t % method.schedule.stride == 0:
                new = {(n, i) for n, flat in first_k(scores, 101).items() for i in flat}
                for name, i in self.held.keys() - new:
                    self.model.get_parameter(name).detach().view(-1)[i] = self.base[name].view(-1)[i]
                self.held = {key: self.held.get(key, [0, 0.0, 0.0]) for key in new}
            return
        for name, i in self.held:
            taken.setdefault(name, []).append(i)
        due = method.cumulative(self.t, 101) - len(self.held)
        for name, flat in first_k(scores, due, {n: torch.tensor(i) for n, i in taken.items()}).items():
            self.held |= {(name, i): [0, 0.0, 0.0] for i in flat}


def _adamw(w, g, adam, weight_decay):
    adam[0] += 1
    adam[1] = BETAS[0] * adam[1] + (1 - BETAS[0]) * g
    adam[2] = BETAS[1] * adam[2] + (1 - BETAS[1]) * g * g
    m, v = adam[1] / (1 - BETAS[0] ** adam[0]), adam[2] / (1 - BETAS[1] ** adam[0])
    return w * (1 - LR * weight_decay) - LR * m / (math.sqrt(v) + EPS)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("method", ["id3", "id3_strided", "repeat_d3", "repeat_d3_strided"])
def test_entry_is_adam_with_a_step_counter_per_weight(method, weight_decay):
    model, selection, optimizer = begin(method, DOUBLE, dense=None, weight_decay=weight_decay, bias_correction="entry")
    naive, handed_over = Naive(model, METHODS[method](), weight_decay), 0
    for x in data(24, DOUBLE):
        held = set(naive.held)
        naive.step(x)
        handed_over += len(held - naive.held.keys())
        train(model, optimizer, [x], square)
        torch.testing.assert_close(snapshot(model), snapshot(naive.model), rtol=1e-11, atol=1e-13)
        ages = optimizer.state[selection.values]["age"]
        assert sorted(ages[: selection.used].tolist()) == sorted(adam[0] for adam in naive.held.values())
        assert not ages[selection.used :].any()
    assert (handed_over > 20) == method.startswith("repeat")
    assert len({adam[0] for adam in naive.held.values()}) > 5


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.0), (0.0, 0.0)])
def test_entry_with_a_beta_of_zero(betas):
    model, selection, optimizer = begin("pafi", betas=betas, weight_decay=0.0, bias_correction="entry")
    mean_square(model, data(1)[0]).backward()
    before, gradient = selection.values.detach().clone(), selection.values.grad.clone()
    optimizer.step()
    torch.testing.assert_close(selection.values - before, -LR * gradient.sign(), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("chunk", [1, 16, 40])
def test_entry_does_not_depend_on_the_size_of_a_chunk(chunk, monkeypatch):
    whole, _, optimizer = begin("id3", DOUBLE, bias_correction="entry")
    train(whole, optimizer, data(8, DOUBLE))
    monkeypatch.setattr(optim, "_CHUNK", chunk)
    pieces, _, optimizer = begin("id3", DOUBLE, bias_correction="entry")
    train(pieces, optimizer, data(8, DOUBLE))
    torch.testing.assert_close(snapshot(pieces), snapshot(whole), rtol=1e-12, atol=1e-14)


class Allocations(TorchDispatchMode):
    """Records the sizes of the storages that operations allocate."""

    def __init__(self, known):
        super().__init__()
        self.known, self.sizes = {t.untyped_storage().data_ptr() for t in known}, [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.sizes.append(out.untyped_storage().nbytes())
        return out


@BOTH
def test_a_step_allocates_nothing_of_the_budgets_size(bias_correction, monkeypatch):
    monkeypatch.setattr(optim, "_CHUNK", 64)
    torch.manual_seed(0)
    selection = unmask.select(nn.Linear(100, 100), unmask.random_mask(10_000))
    optimizer = SelectiveAdamW(selection.parameters(), bias_correction=bias_correction)
    train(selection.model, optimizer, batches(1, width=100))
    mean_square(selection.model, batches(1, width=100)[0]).backward()
    values = selection.values
    held = [values, values.grad, *optimizer.state[values].values()]
    with Allocations(held) as seen:
        SelectiveAdamW.step.__wrapped__(optimizer)  # this leaves out the hooks, which write into the model
    assert max(seen.sizes) <= 2 * 64 * torch.get_num_threads() * 4


# Which slots step.


@pytest.mark.parametrize("method", METHODS)
def test_in_use_is_what_the_coming_step_trains(method):
    model, selection, optimizer = begin(method, bias_correction="entry")
    for x in data(22):
        mean_square(model, x).backward()
        coming = selection.in_use
        assert slots_in_use(selection.values) == coming
        optimizer.step()
        assert coming == (0 if method == "full" else selection.used)
    assert slots_in_use(nn.Parameter(torch.ones(2))) is None
    selection.release()
    assert slots_in_use(selection.values) is None


def test_a_selected_weight_whose_gradient_is_zero_ages_like_the_others():
    model = nn.Embedding(10, 4)
    selection = unmask.select(model, unmask.random_mask(30))
    optimizer = SelectiveAdamW(selection.parameters(), lr=LR, weight_decay=0.0, bias_correction="entry")
    rows = selection.ledger.positions // 4
    assert (rows == 9).any()
    for step in range(6):
        model(torch.tensor([9 if step == 5 else 0])).square().sum().backward()
        assert not selection.values.grad[rows == (0 if step == 5 else 9)].any()
        before = selection.values.detach().clone()
        optimizer.step()
    assert (optimizer.state[selection.values]["age"] == 6).all()
    late = (selection.values - before)[rows == 9].abs() / LR  # its first gradient comes at age 6
    torch.testing.assert_close(late, torch.full_like(late, first_move(6)), rtol=1e-3, atol=0)


@BOTH
def test_slots_not_in_use_stay_untouched(bias_correction):
    """A penalty on the whole vector gives them a gradient. "global" steps whole lines of 64 slots."""
    model, selection, optimizer = begin("id3", weight_decay=0.5, bias_correction=bias_correction)
    for x in data(4):
        (mean_square(model, x) + selection.values.sum()).backward()
        assert selection.values.grad.all()
        optimizer.step()
    edge = selection.used if bias_correction == "entry" else 64
    assert selection.used == 20
    assert not selection.values[edge:].any()
    assert not any(s[edge:].any() for s in optimizer.state[selection.values].values() if s.ndim)


def test_a_slot_that_gets_another_weight_starts_at_age_one():
    _, selection, optimizer = begin("repeat_d3", bias_correction="entry")
    train(selection.model, optimizer, data(10))
    before = selection.ledger.positions.clone()
    ages = optimizer.state[selection.values]["age"].clone()
    train(selection.model, optimizer, data(12)[10:11])
    changed = selection.ledger.positions != before
    assert changed.any()
    assert not changed.all()
    expected = torch.where(changed, 1.0, ages + 1)
    assert torch.equal(optimizer.state[selection.values]["age"], expected)


# The first move of a weight that is unmasked late (docs/optim.md).


def first_move(t, betas=BETAS):
    """Returns the first move under "global" in units of lr, without weight decay and eps."""
    b1, b2 = betas
    return (1 - b1) / (1 - b1**t) / math.sqrt((1 - b2) / (1 - b2**t))


@BOTH
def test_the_first_move_of_a_late_weight(bias_correction):
    torch.manual_seed(0)
    model = mlp(dtype=DOUBLE)
    selection = unmask.select(model, unmask.id3(120, steps=120))
    optimizer = SelectiveAdamW(
        selection.parameters(), lr=1e-4, eps=1e-14, weight_decay=0.0, bias_correction=bias_correction
    )
    for t, x in enumerate(batches(120, dtype=DOUBLE), start=1):
        square(model, x).backward()
        newest, g = selection.values[t - 1].item(), selection.values.grad[t - 1].item()
        optimizer.step()
        move = selection.values[t - 1].item() - newest
        size = first_move(t) if bias_correction == "global" else 1.0
        assert move == pytest.approx(-1e-4 * size * math.copysign(1, g), rel=1e-6)


def late_weight(t):
    """Returns (parameter, optimizer) before step t, where all gradients have been 0 so far."""
    p = nn.Parameter(torch.zeros(1, dtype=DOUBLE))
    optimizer = SelectiveAdamW([p], lr=1.0, eps=1e-14, weight_decay=0.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["step"].fill_(t - 1)
    return p, optimizer


TABLE = {1: 1.0, 10: 0.48, 12: 0.48, 100: 0.98, 106: 1.0, 511: 2.0, 1_000: 2.51, 10_000: 3.16}


@pytest.mark.parametrize("t", TABLE)
def test_first_moves_of_the_docs(t):
    p, optimizer = late_weight(t)
    p.grad = torch.full_like(p, 0.3)
    optimizer.step()
    assert -p.item() == pytest.approx(first_move(t), rel=1e-9)
    assert round(first_move(t), 2) == TABLE[t]


def test_what_the_docs_say_of_first_moves_in_between():
    moves = {t: first_move(t) for t in range(1, 2_000)}
    assert min(moves, key=moves.get) == 12
    assert next(t for t in moves if t > 1 and moves[t] >= 1) == 106
    assert next(t for t in moves if moves[t] >= 2) == 511
    assert (1 - BETAS[0]) / math.sqrt(1 - BETAS[1]) == pytest.approx(3.16, abs=5e-3)


def test_later_moves_of_the_docs():
    """Under a constant gradient, the k-th move is lr (1 - b1^k) / sqrt(1 - b2^k), once b^t is 0."""
    (p, optimizer), moves = late_weight(10**6), {}
    for k in range(1, 41):
        before, p.grad = p.item(), torch.full_like(p, 0.3)
        optimizer.step()
        moves[k] = before - p.item()
        assert moves[k] == pytest.approx((1 - BETAS[0] ** k) / math.sqrt(1 - BETAS[1] ** k), rel=1e-9)
    assert max(moves, key=moves.get) == 12
    assert round(moves[12], 2) == 6.57
