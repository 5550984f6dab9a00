"""Tests half precision, loss scaling, non-finite gradients, and that no optimizer touches unselected weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import (
    as_lists,
    assert_same_tensors,
    assert_unselected_is_base,
    batches,
    d3_scores,
    dense_gradients,
    first_k,
    gradient_at_slots,
    id3_run,
    mean_square,
    mlp,
    snapshot,
    train,
)

import unmask
from unmask import NonFiniteGradientError, SelectionError

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
}
METHODS = [
    unmask.id3(20, steps=5),
    unmask.repeat_d3(20),
    unmask.pafi(20),
    unmask.random_mask(20).but(strategy="increment"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unselected_weights_are_bitwise_the_bases_under_any_optimizer(optimizer, method, dtype):
    model = mlp(dtype=dtype)
    base, selection = snapshot(model), unmask.select(model, method)
    opt = OPTIMIZERS[optimizer](selection.parameters())
    for x in batches(7, dtype=dtype):
        train(model, opt, [x])
        assert_unselected_is_base(model, base, selection)
    assert any(not torch.equal(base[name], tensor) for name, tensor in snapshot(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_the_rounding_of_their_masters(dtype):
    model = mlp(dtype=dtype)
    selection, optimizer = id3_run(model)
    for x in batches(6, dtype=dtype):
        train(model, optimizer, [x])
        held = selection.ledger.positions[: selection.used]
        weights = selection.ledger.layout.read(held, torch.float32)
        assert torch.equal(weights, selection.values[: selection.used].to(dtype).float())
    assert selection.values.dtype == torch.float32
    assert not torch.equal(weights, selection.values)


def test_updates_that_bfloat16_would_lose_add_up_in_the_masters():
    weight = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(weight.weight, 1.0)
    selection = unmask.select(weight, unmask.random_mask(1))
    optimizer = torch.optim.SGD(selection.parameters(), lr=1e-4)
    for _ in range(100):
        weight(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert selection.values.item() == pytest.approx(0.99, abs=1e-5)
    assert weight.weight.item() == torch.tensor(0.99).bfloat16().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_half_precision_weights_are_taken_in_float32(dtype):
    model, x = mlp(dtype=dtype), batches(1, dtype=dtype)[0]
    expected = first_k(d3_scores(model, dense_gradients(model, lambda m: mean_square(m, x))), 25)
    selection = unmask.select(model, unmask.static_d3(25))
    train(model, torch.optim.SGD(selection.parameters(), lr=0.1), [x])
    assert as_lists(selection.indices) == expected


def test_autocast_gives_the_gradient_that_autograd_gives():
    def loss(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean_square(model, batches(1)[0]) + mean_square(model, batches(2)[1])

    model = mlp()
    dense = dense_gradients(model, loss)
    selection = unmask.select(model, unmask.random_mask(budget="100%"))
    loss(model).backward()
    torch.testing.assert_close(selection.values.grad, gradient_at_slots(selection, dense), rtol=1e-2, atol=1e-4)
    assert selection.values.dtype == torch.float32


def test_a_float64_model_has_float64_masters():
    model = mlp(dtype=torch.float64)
    selection, optimizer = id3_run(model)
    train(model, optimizer, batches(5, dtype=torch.float64))
    assert selection.values.dtype == torch.float64
    held = selection.ledger.positions
    assert torch.equal(selection.ledger.layout.read(held, torch.float64), selection.values.detach())


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer skips a step inside its kernel
@pytest.mark.parametrize("parts", [1, 2])
def test_a_scaler_changes_nothing_but_an_overflow_that_it_skips_consumes_nothing(method, parts, fused):
    results = []
    for overflow in (None, 0, 1, 2):
        torch.manual_seed(0)
        model = mlp()
        selection = unmask.select(model, method)
        optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, backoff_factor=1.0 / 2)
        for i, x in enumerate(batches(5)):
            if i == overflow:
                before = (snapshot(model), selection.used, selection.step)
                for part in (x, math.inf * x)[-parts:]:
                    scaler.scale(mean_square(model, part)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert_same_tensors(before[0], snapshot(model))
                assert (selection.used, selection.step) == before[1:]
                assert scaler.get_scale() == 2.0**9
            for part in x.chunk(parts):
                scaler.scale(mean_square(model, part)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(selection.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(snapshot(model))
    for other in results[1:]:
        assert_same_tensors(results[0], other)


def test_a_state_taken_after_a_skipped_step_resumes_like_the_uninterrupted_run():
    """The weights that the skipped step proposed are in ``values`` until the next backward, but not in the state."""
    results = []
    for skip in (False, True):
        torch.manual_seed(0)
        model = mlp()
        twin = copy.deepcopy(model)
        selection = unmask.select(model, unmask.repeat_d3(20))
        train(model, torch.optim.SGD(selection.parameters(), lr=0.1), batches(3))
        if skip:
            mean_square(model, 5 * batches(9)[8]).backward()
            selection.values.grad = None
        resumed = unmask.select(twin, unmask.repeat_d3(20))
        resumed.load_state_dict(selection.state_dict())
        train(twin, torch.optim.SGD(resumed.parameters(), lr=0.1), batches(3))
        results.append(snapshot(twin))
    assert_same_tensors(*results)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("at", [0, 2])
def test_a_non_finite_loss_is_refused_and_changes_nothing(method, at, poison):
    model = mlp()
    selection = unmask.select(model, method)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
    train(model, optimizer, batches(at))
    before, state = snapshot(model), selection.state_dict()
    (mean_square(model, batches(1)[0]) * poison).backward()
    with pytest.raises(NonFiniteGradientError, match="changed nothing"):
        optimizer.step()
    after = selection.state_dict()
    assert_same_tensors(before, snapshot(model))
    assert_same_tensors(*({k: s[k] for k in ("values", "base", "positions")} for s in (state, after)))
    assert (selection.step, selection.used) == (state["step"], state["used"])
    optimizer.zero_grad()
    train(model, optimizer, batches(1))  # the run goes on
    assert selection.step == state["step"] + 1


def test_a_non_finite_gradient_of_a_dense_tensor_is_refused():
    model = mlp()
    selection = unmask.select(model, unmask.id3(5, steps=2), dense="^4")
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
    mean_square(model, batches(1)[0]).backward()
    model[4].bias.grad[0] = torch.nan
    with pytest.raises(NonFiniteGradientError, match=r"4\.bias"):
        optimizer.step()
    assert selection.step == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_closure_is_the_same_run_as_without(optimizer):
    results = []
    for closure in (False, True):
        torch.manual_seed(0)
        model = mlp()
        selection = unmask.select(model, unmask.repeat_d3(15))
        opt = OPTIMIZERS[optimizer](selection.parameters())
        for x in batches(4):

            def evaluate(model=model, opt=opt, x=x):
                opt.zero_grad()
                loss = mean_square(model, x)
                loss.backward()
                return loss

            if closure:
                assert opt.step(evaluate).item() > 0
            else:
                evaluate()
                opt.step()
        results.append(snapshot(model))
    assert_same_tensors(*results)


def test_a_non_finite_loss_in_a_closure_is_refused_and_changes_nothing():
    model = mlp()
    selection, optimizer = id3_run(model)
    before = snapshot(model)

    def evaluate():
        loss = mean_square(model, batches(1)[0]) * math.nan
        loss.backward()
        return loss

    with pytest.raises(NonFiniteGradientError):
        optimizer.step(evaluate)
    assert_same_tensors(before, snapshot(model))
    assert selection.step == 0
    assert torch.equal(selection.state_dict()["values"], torch.zeros(12))


def test_an_optimizer_that_evaluates_more_than_once_per_step_is_refused():
    model = mlp()
    selection = unmask.select(model, unmask.random_mask(10))
    evaluate = _closure(model, selection)
    with pytest.raises(SelectionError, match="LBFGS calls its closure more than once"):
        torch.optim.LBFGS(selection.parameters()).step(evaluate)


def test_lbfgs_with_one_evaluation_per_step_descends():
    model = mlp()
    selection = unmask.select(model, unmask.random_mask(10))
    optimizer, evaluate = torch.optim.LBFGS(selection.parameters(), max_iter=1, lr=0.1), _closure(model, selection)
    losses = [optimizer.step(evaluate).item() for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert selection.step == 6


def _closure(model, selection):
    x = batches(1)[0]

    def evaluate():
        selection.values.grad = None
        loss = mean_square(model, x)
        loss.backward()
        return loss

    return evaluate
