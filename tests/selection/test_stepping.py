"""Tests the order of calls, and optimizers of many kinds."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from helpers import assert_same_tensors, batches, dense_gradients, id3_run, mean_square, mlp, snapshot, train
from torch import nn

import unmask
from unmask import ScheduleNotRunError


def test_an_optimizer_over_the_models_own_parameters_is_refused():
    model = mlp()
    selection = unmask.select(model, unmask.id3(10, steps=3))
    wrong = torch.optim.AdamW(model.parameters())
    mean_square(model, batches(1)[0]).backward()
    with pytest.raises(ScheduleNotRunError, match=r"selection\.parameters\(\)"):
        wrong.step()
    assert selection.step == 0


def test_an_optimizer_over_a_half_precision_dense_tensor_instead_of_its_master_is_refused():
    model = mlp(dtype=torch.bfloat16)
    unmask.select(model, unmask.id3(10, steps=3), dense="^4")
    wrong = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    mean_square(model, batches(1, dtype=torch.bfloat16)[0]).backward()
    with pytest.raises(ScheduleNotRunError, match="holds the model's frozen"):
        wrong.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_without_backward_is_refused_and_changes_nothing(steps_before, set_to_none):
    model = mlp()
    selection, optimizer = id3_run(model)
    for x in batches(steps_before):
        mean_square(model, x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    before = snapshot(model)
    with pytest.raises(ScheduleNotRunError, match=r"loss\.backward\(\)"):
        optimizer.step()
    assert selection.step == steps_before
    assert_same_tensors(before, snapshot(model))


def test_a_backward_through_a_copy_of_the_model_is_no_step_of_the_selection():
    model = mlp()
    _, optimizer = id3_run(model)
    twin = copy.deepcopy(model).requires_grad_(True)
    mean_square(twin, batches(1)[0]).backward()
    with pytest.raises(ScheduleNotRunError, match="not a copy of it"):
        optimizer.step()


@pytest.mark.parametrize("zero_grad", ["optimizer", "model", "neither"])
def test_the_step_spends_the_gradient(zero_grad):
    """transformers' Trainer calls ``model.zero_grad()``, which reaches neither ``values`` nor half-precision masters."""
    model, twin = mlp(dtype=torch.bfloat16), mlp(dtype=torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    for net, way in ((model, "optimizer"), (twin, zero_grad)):
        selection = unmask.select(net, unmask.id3(12, steps=3), dense="^4")
        optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05)
        for x in batches(5, dtype=torch.bfloat16):
            mean_square(net, x).backward()
            optimizer.step()
            if way != "neither":
                (optimizer if way == "optimizer" else net).zero_grad()
    assert_same_tensors(snapshot(model), snapshot(twin))


def test_a_penalty_on_the_values_adds_to_their_gradient():
    model = mlp()
    selection, x = unmask.select(model, unmask.random_mask(10)), batches(1)[0]
    (mean_square(model, x) + 0.5 * selection.values.square().sum()).backward()
    with_penalty, selection.values.grad = selection.values.grad, None
    mean_square(model, x).backward()
    torch.testing.assert_close(with_penalty, selection.values.grad + selection.values.detach())


def test_a_backward_of_a_penalty_alone_selects_nothing_and_is_no_step():
    model = mlp()
    selection, optimizer = id3_run(model)
    selection.values.square().sum().backward()
    with pytest.raises(ScheduleNotRunError, match="no gradient has reached the selection"):
        optimizer.step()
    assert (selection.step, selection.used) == (0, 0)


@pytest.mark.parametrize("heuristic", ["d3", "random", "small_magnitude"])
def test_slots_not_in_use_have_no_gradient_and_no_optimizer_state(heuristic):
    model = mlp()
    selection = unmask.select(model, unmask.id3(20, steps=5).but(heuristic=unmask.heuristic(heuristic)))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
    for t, x in enumerate(batches(4)):
        mean_square(model, x).backward()
        due = 4 * (t + 1)
        assert selection.values.grad[:due].all()
        assert not selection.values.grad[due:].any()
        optimizer.step()
        assert not any(state[due:].any() for state in optimizer.state[selection.values].values() if state.ndim)


def test_two_selections_on_two_models_in_one_graph_do_not_disturb_each_other():
    first, second, twins = mlp(), mlp(), [mlp(), mlp()]
    for model, twin in zip((first, second), twins, strict=True):
        twin.load_state_dict(model.state_dict())

    def loss(a, b, x):
        return b(a(x)).square().mean() + a(x).sin().mean()

    dense = [dense_gradients(m, f) for m, f in zip(
        twins, (lambda m: loss(m, twins[1], batches(1)[0]), lambda m: loss(twins[0], m, batches(1)[0])), strict=True
    )]  # fmt: skip
    selections = [unmask.select(first, unmask.random_mask(20)), unmask.select(second, unmask.id3(20, steps=2))]
    loss(first, second, batches(1)[0]).backward()
    for selection, gradients in zip(selections, dense, strict=True):
        flat = torch.cat([gradients[name].reshape(-1) for name in selection.ledger.layout.names])
        tentative = selection.ledger.tentative
        positions = selection.ledger.positions if tentative is None else tentative.positions
        grad = selection.values.grad if tentative is None else selection.values.grad[tentative.slots]
        torch.testing.assert_close(grad, flat[positions])
    separate = [torch.optim.SGD(s.parameters(), lr=0.1) for s in selections]
    separate[0].step()
    assert [s.step for s in selections] == [1, 0]
    separate[1].step()
    assert [s.step for s in selections] == [1, 1]


def test_one_optimizer_serves_two_selections_and_other_parameters():
    first, second, extra = mlp(), mlp(), nn.Parameter(torch.ones(6))
    selections = [unmask.select(m, unmask.id3(10, steps=2)) for m in (first, second)]
    optimizer = torch.optim.AdamW(
        [{"params": [s.values], "lr": lr} for s, lr in zip(selections, (0.1, 0.0), strict=True)] + [{"params": [extra]}]
    )
    frozen = snapshot(second)
    for x in batches(3):
        second(first(x) * extra).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [(s.step, s.used) for s in selections] == [(3, 10), (3, 10)]
    assert not torch.equal(extra, torch.ones(6))
    assert_same_tensors(frozen, snapshot(second))


def test_an_unrelated_optimizer_may_step_at_any_time():
    model, other = mlp(), nn.Linear(2, 2)
    selection, _ = id3_run(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert selection.step == 0


def test_a_forgotten_selection_does_not_disturb_later_ones():
    for _ in range(3):
        model = mlp()
        _, optimizer = id3_run(model)
        train(model, optimizer, batches(1))
        del model, optimizer, _
        gc.collect()
    model = mlp()
    selection, optimizer = id3_run(model)
    train(model, optimizer, batches(2))
    assert selection.step == 2


@pytest.mark.parametrize("dense", [None, "^4"])
def test_a_selection_lives_as_long_as_its_model(dense):
    model = mlp(dtype=torch.bfloat16)
    before = snapshot(model)
    method = unmask.full() if dense else unmask.id3(10, steps=2)
    optimizer = torch.optim.SGD(unmask.select(model, method).parameters(), lr=1.0)
    gc.collect()
    train(model, optimizer, batches(2, dtype=torch.bfloat16))
    assert any(not torch.equal(before[name], tensor) for name, tensor in snapshot(model).items())


def test_learning_rate_schedules_and_clipping_act_on_the_selected_weights_alone():
    model = mlp()
    selection, x = unmask.select(model, unmask.random_mask(10)), batches(1)[0]
    optimizer = torch.optim.SGD(selection.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    for expected_lr in (1.0, 0.1, 0.01):
        before = selection.values.detach().clone()
        mean_square(model, 50 * x).backward()
        norm = torch.nn.utils.clip_grad_norm_(selection.parameters(), 1e-3)
        assert norm > 1e-3
        optimizer.step()
        scheduler.step()
        assert (selection.values - before).norm().item() == pytest.approx(expected_lr * 1e-3, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_tensors_train_whole_outside_the_budget(dtype):
    model, x = mlp(dtype=dtype), batches(1, dtype=dtype)[0]
    gradients, before = dense_gradients(model, lambda m: mean_square(m, x)), snapshot(model)
    selection = unmask.select(model, unmask.id3(10, steps=3), dense="^4")
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.5)
    assert [p.dtype for p in selection.parameters()] == [torch.float32] * 3
    assert (selection.dense_numel, selection.budget) == (42, 10)
    train(model, optimizer, [x])
    for name in ("4.weight", "4.bias"):
        expected = (before[name].float() - 0.5 * gradients[name].float()).to(dtype)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=0, atol=1e-6)
        assert name not in selection.indices
    assert selection.used == 3


def test_dense_tensors_of_half_precision_collect_small_updates_and_micro_batches_in_float32():
    model, twin = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16), nn.Linear(1, 1, bias=False)
    for net in (model, twin):
        nn.init.constant_(net.weight, 1.0)
    selection = unmask.select(model, unmask.full())
    optimizer = torch.optim.SGD(selection.parameters(), lr=1e-4)
    for _ in range(50):
        for _ in range(2):
            model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert selection.parameters()[0].item() == pytest.approx(0.99, abs=1e-5)
    assert model.weight.item() == torch.tensor(0.99).bfloat16().item()


def test_two_optimizers_one_for_the_values_and_one_for_the_dense_tensors():
    model, twin = mlp(dtype=torch.bfloat16), mlp(dtype=torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    for net, split in ((model, False), (twin, True)):
        selection = unmask.select(net, unmask.id3(10, steps=2), dense="^4")
        values, *dense = selection.parameters()
        groups = [[values], dense] if split else [[values, *dense]]
        optimizers = [torch.optim.AdamW(group, lr=0.1) for group in groups]
        for x in batches(3, dtype=torch.bfloat16):
            mean_square(net, x).backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert_same_tensors(snapshot(model), snapshot(twin))


def test_full_is_ordinary_fine_tuning():
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    selection = unmask.select(model, unmask.full())
    train(model, torch.optim.AdamW(selection.parameters(), lr=0.05), batches(4))
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.05), batches(4))
    torch.testing.assert_close(snapshot(model), snapshot(twin))
    assert (selection.used, selection.budget, selection.step) == (126, 126, 4)


@pytest.mark.parametrize("method", [unmask.full(), unmask.pafi(5)], ids=["full", "pafi"])
def test_a_model_has_one_live_selection_at_a_time(method: unmask.Method) -> None:
    model = torch.nn.Linear(4, 4)
    delta = _delta_of(model)
    selection = unmask.select(model, method)
    with pytest.raises(unmask.MethodError, match="already has a selection"):
        unmask.select(model, unmask.pafi(5))
    with pytest.raises(unmask.DeltaError, match="live selection"):
        delta.apply(model)
    selection.release()
    delta.apply(model)


def _delta_of(model: torch.nn.Module) -> unmask.SparseDelta:
    selection = unmask.select(model, unmask.pafi(3))
    delta = selection.delta()
    selection.release()
    return delta


class Emptied(torch.optim.AdamW):
    """An optimizer that a library builds of the parameters that require grad, where none does."""

    def __init__(self) -> None:
        super().__init__([{"params": []}, {"params": []}], lr=0.1)


def test_an_optimizer_that_found_nothing_to_train_is_refused_at_its_first_step():
    model = mlp()
    selection = unmask.select(model, unmask.id3(10, steps=3))
    mean_square(model, batches(1)[0]).backward()
    with pytest.raises(ScheduleNotRunError, match=r"holds no parameter.*selection\.parameters\(\)"):
        Emptied().step()
    assert selection.step == 0


def test_an_optimizer_of_the_dense_tensors_alone_is_refused_once_the_selected_gradient_was_wasted():
    """A library builds it of the parameters that require grad, where only a head does.

    It is not refused at the first step, since another optimizer may step next.
    """
    model = mlp()
    selection = unmask.select(model, unmask.id3(10, steps=3), dense="^4")
    head = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ScheduleNotRunError, match="holds the dense tensors alone"):
        train(model, head, batches(2))
    assert selection.step == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_head_may_be_trained_alone_if_the_selected_gradient_is_dropped(set_to_none):
    model = mlp()
    selection = unmask.select(model, unmask.id3(10, steps=3), dense="^4")
    values, *dense = selection.parameters()
    head, both = torch.optim.SGD(dense, lr=0.1), torch.optim.SGD([values], lr=0.1)
    for x in batches(3):
        mean_square(model, x).backward()
        head.step()
        both.zero_grad()
        head.zero_grad(set_to_none=set_to_none)
    for x in batches(3):
        mean_square(model, x).backward()
        head.step()
        both.step()
        head.zero_grad()
    assert selection.step == 3


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adagrad, unmask.SelectiveAdamW]
)
def test_optimizer_state_loaded_without_the_selections_is_refused(optimizer):
    """A Trainer that knows nothing of the selection resumes like this."""
    model = mlp()
    fresh = copy.deepcopy(model)
    selection = unmask.select(model, unmask.id3(10, steps=6))
    first = optimizer(selection.parameters(), lr=0.1)
    train(model, first, batches(3))
    again = unmask.select(fresh, unmask.id3(10, steps=6))
    second = optimizer(again.parameters(), lr=0.1)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ScheduleNotRunError, match="has taken 3 steps of the selected weights, the selection 0"):
        train(fresh, second, batches(1))
    second.zero_grad()
    again.load_state_dict(selection.state_dict())
    train(fresh, second, batches(2))
    assert again.step == 5


def test_a_new_optimizer_goes_on_with_a_selection_that_has_stepped():
    model = mlp()
    selection, optimizer = id3_run(model)
    train(model, optimizer, batches(2))
    train(model, torch.optim.AdamW(selection.parameters(), lr=0.1), batches(2))
    assert selection.step == 4


class EightBit(torch.optim.SGD):
    """Keeps a state in codes as bitsandbytes does; code 2 means 0."""

    def __init__(self, params, name="state1", codes=(-1.0, -0.5, 0.0, 1.0)):
        super().__init__(params, lr=0.1)
        self._name, self._codes = name, torch.tensor(codes)

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                self.state[p] = {self._name: torch.full(p.shape, 3, dtype=torch.uint8), "qmap1": self._codes}


def test_a_slot_that_gets_another_weight_starts_from_the_code_of_zero_in_an_8_bit_state():
    model = mlp()
    selection = unmask.select(model, unmask.repeat_d3(30))
    optimizer = EightBit(selection.parameters())
    train(model, optimizer, batches(1))
    before = selection.ledger.positions.clone()
    train(model, optimizer, [9 * x for x in batches(3)[2:]])
    entered = selection.ledger.positions != before
    assert entered.any()
    assert (optimizer.state[selection.values]["state1"] == 3 - entered.to(torch.uint8)).all()


@pytest.mark.parametrize("settings", [{"name": "codes"}, {"codes": (-1.0, 1.0)}])
def test_a_state_in_an_unknown_code_is_refused_where_slots_get_other_weights(settings):
    model = mlp()
    selection = unmask.select(model, unmask.repeat_d3(30))
    with pytest.raises(unmask.SelectionError, match="code that is not known"):
        train(model, EightBit(selection.parameters(), **settings), [9**i * x for i, x in enumerate(batches(3))])


class Outer(torch.optim.AdamW):
    """A user's subclass that calls its super's step, whose hooks run inside those of the outer step."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("method", [unmask.id3(12, steps=4, stride=2), unmask.repeat_d3(12)], ids=lambda m: m.name)
def test_an_optimizer_that_steps_through_its_supers_step_steps_once(method):
    results = []
    for kind in (torch.optim.AdamW, Outer):
        torch.manual_seed(0)
        model = mlp()
        selection = unmask.select(model, method)
        train(model, kind(selection.parameters(), lr=0.1), batches(4))
        assert selection.step == 4
        results.append(snapshot(model))
    assert_same_tensors(*results)
