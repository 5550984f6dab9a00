"""Checks that training on a quantised base equals training on its float weights, and does not change the base."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from helpers import dense_gradients, gradient_at_slots, id3_run
from quantised_nets import HIDDEN, KINDS, WIDTH, as_float, data, loss, payload, quantised
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import unmask
from unmask import MethodError
from unmask.gradients.backend import portable
from unmask.methods.scopes import Scope
from unmask.quantised.layers import hook_of
from unmask.ranking import ranker as streamed

MATRICES = Scope.patterns(r"(up|down)\.weight")
METHODS = {
    "random": lambda: unmask.random_mask(400),
    "id3": lambda: unmask.id3(400, steps=15),
    "id3, stride": lambda: unmask.id3(400, steps=15, stride=5),
    "repeat": lambda: unmask.repeat_d3(300, stride=3),
    "kept": lambda: unmask.repeat_d3(300, stride=3, leaving="kept"),
    "rows": lambda: unmask.id3(400, steps=10).but(allocation="row"),
    "snip": lambda: unmask.id3(400, steps=10, stride=2).but(heuristic=unmask.heuristic("snip")),
    "pafi": lambda: unmask.pafi(400),
}


def run(net: nn.Module, method: unmask.Method, steps: int = 20, **options: str) -> tuple[unmask.Selection, list[float]]:
    selection = unmask.select(net, method, **options)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        value = loss(net, data(step))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return selection, losses


def assert_same_run(net: nn.Module, method: unmask.Method, **options: str) -> unmask.Selection:
    """Compares with the same selection on the float network: equal masks, and losses and values up to rounding."""
    twin = as_float(net)
    mine, losses = run(net, method, **options)
    reference, expected = run(twin, method, **options)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert mine.indices.keys() == reference.indices.keys()
    for name, flat in reference.indices.items():
        assert torch.equal(mine.indices[name], flat), name
    torch.testing.assert_close(mine.values, reference.values, rtol=1e-3, atol=1e-4)
    return mine


@pytest.mark.parametrize("backend", [contextlib.nullcontext, portable], ids=["cpu", "portable"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["random", "id3", "id3, stride"])
def test_training_equals_training_on_the_float_weights(kind, method, backend):
    with backend():
        trains_as_on_the_float_weights(kind, method)


def trains_as_on_the_float_weights(kind, method):
    net = quantised(kind)
    before = payload(net)
    selection = assert_same_run(net, METHODS[method]().but(scope=MATRICES))
    assert selection.used == 400
    assert set(selection.indices) == {"up.weight", "down.weight"}
    after = payload(net)
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # the bytes: torchao's tensors compare through their parts
        assert repr(tensor) == repr(after[name]) if type(tensor) is not Tensor else torch.equal(tensor, after[name])


@pytest.mark.parametrize("method", ["repeat", "kept", "rows", "snip", "pafi"])
@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_every_way_to_choose(kind, method):
    assert_same_run(quantised(kind), METHODS[method]())


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
def test_quantised_and_float_tensors_share_a_budget(kind):
    selection = assert_same_run(quantised(kind), unmask.id3(300, steps=15), dense=r"head\.bias")
    assert {"up.weight", "head.weight"} <= set(selection.indices)


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
def test_biases_of_quantised_layers_train(kind):
    """Trains biases that bitsandbytes' 8-bit layer hands to an autograd Function, where no tap sees them."""
    net = quantised(kind)
    selection = assert_same_run(net, unmask.bitfit())
    assert {"up.bias", "down.bias"} <= set(selection.indices)
    assert all(hook_of(layer) is None for layer in net.modules())


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
@pytest.mark.parametrize("options", [{"checkpointed": True}, {"checkpointed": False}, {"twice": True}])
def test_checkpointing_and_repeated_use(kind, options):
    assert_same_run(quantised(kind, **options), unmask.id3(300, steps=10, stride=2))


@pytest.mark.parametrize("gradients", ["auto", "sampled", "dense"])
@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
def test_gradients_are_those_of_the_float_network(kind, gradients):
    """Compares the gradients of the slots, in all kinds of steps, and of the input, through base and sidecar."""
    net = quantised(kind)
    selection = unmask.select(net, unmask.id3(200, steps=4, stride=2), gradients=gradients)
    optimizer = torch.optim.SGD(selection.parameters(), lr=1.0)
    for step in range(4):
        x = data(step).requires_grad_()
        twin, y = as_float(net), data(step).requires_grad_()
        loss(net, x).backward()
        expected = gradient_at_slots(selection, dense_gradients(twin, lambda m, step=step: loss(m, data(step))))
        torch.testing.assert_close(selection.values.grad, expected, rtol=1e-4, atol=1e-6)
        loss(twin, y).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()


def test_accumulation_and_a_dropped_batch():
    net = quantised("nf4")
    twin = as_float(net)
    for model in (net, twin):
        selection, optimizer = id3_run(model, budget=100, steps=4)
        loss(model, data(9)).backward()
        optimizer.zero_grad()  # dropped: nothing is consumed
        for step in range(4):
            for micro in (2 * step, 2 * step + 1):
                loss(model, data(micro)).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.selection = selection
    assert {n: f.tolist() for n, f in net.selection.indices.items()} == {
        n: f.tolist() for n, f in twin.selection.indices.items()
    }
    torch.testing.assert_close(net.selection.values, twin.selection.values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
def test_bfloat16_activations(kind):
    """Checks a base that computes in bfloat16: the values are float32 and the change reaches the output."""
    net = quantised(kind, torch.bfloat16)
    base = net(data(50).bfloat16()).detach()
    selection = unmask.select(net, unmask.id3(400, steps=4, stride=2).but(scope=MATRICES))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        value = loss(net, data(50).bfloat16())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert selection.values.dtype == torch.float32
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(net(data(50).bfloat16()), base)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_autocast(kind):
    net = quantised(kind)
    selection, optimizer = id3_run(net, budget=200, steps=4)
    for step in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(net, data(step))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert selection.used == 200
    assert torch.isfinite(selection.values).all()


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
def test_inputs_of_every_shape(kind):
    """Tries one token, several dimensions, and no token at all, as an expert may get."""
    net = quantised(kind)
    run(net, unmask.random_mask(300).but(scope=MATRICES), steps=3)
    x = data(3, rows=6)
    flat = net(x)
    torch.testing.assert_close(net(x.view(2, 3, WIDTH)).flatten(0, 1), flat)
    torch.testing.assert_close(net(x[:1])[0], flat[0])
    assert hook_of(net.up)(net.up, (x[:0],), {}, torch.zeros(0, HIDDEN)).shape == (0, HIDDEN)


class Watch(TorchDispatchMode):
    """Records the size of the largest float tensor that unmask's own code makes, not the base's library."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if type(tensor) is Tensor and tensor.is_floating_point() and _is_ours():
                memory = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0
                self.largest = max(self.largest, memory // tensor.element_size())
        return result


def _is_ours() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if "/unmask/quantised/" in frame.f_code.co_filename or "/unmask/gradients/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4 nested", "torchao"])
def test_nothing_is_dequantised_whole(kind, monkeypatch):
    """Checks that steps without selection make no float tensor of a matrix's size; others make one at a time."""
    monkeypatch.setattr(streamed, "BLOCK", 512)
    net, matrix = quantised(kind), WIDTH * HIDDEN
    selection = unmask.select(net, unmask.id3(60, steps=4, stride=2).but(scope=MATRICES))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step in range(4):
        with Watch() as watch:
            loss(net, data(step, rows=8)).backward()
            optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            assert watch.largest < matrix // 4
        else:
            assert watch.largest == matrix
    with Watch() as watch:
        with torch.no_grad():
            net(data(0, rows=8))
        assert watch.largest < matrix // 4


def test_methods_that_cannot_work_are_refused_before_training():
    net = quantised("nf4")
    with pytest.raises(MethodError, match=r"'down.weight' is quantised and cannot be trained whole; leave it out"):
        unmask.select(net, unmask.full())
    with pytest.raises(MethodError, match=r"dense: 'up.weight' is quantised.*modules_to_not_convert"):
        unmask.select(net, unmask.id3(10, steps=2), dense="up.weight")
    with pytest.raises(MethodError, match=r"'down.weight' is quantised, and the calibration of 'fisher'"):
        unmask.select(net, unmask.fish(10, [data(0)], loss=loss))
    with pytest.raises(MethodError, match=r"'up.weight' is quantised but not in the base checkpoint"):
        unmask.select(net, unmask.id3(10, steps=2), new="up")
    assert all(hook_of(layer) is None for layer in net.modules())


def test_an_optimizer_of_the_models_parameters_is_refused():
    net = quantised("nf4")
    unmask.select(net, unmask.id3(10, steps=2).but(scope=MATRICES))
    loss(net, data(0)).backward()
    with pytest.raises(unmask.ScheduleNotRunError, match="Build it from the selection"):
        torch.optim.SGD(net.parameters(), lr=0.1).step()


def test_one_selection_at_a_time_parts_included():
    net = quantised("nf4")
    unmask.select(net, unmask.id3(10, steps=2).but(scope=MATRICES))
    with pytest.raises(MethodError, match="already has a selection"):
        unmask.select(net.up, unmask.id3(10, steps=2))


def test_a_share_is_of_the_weights_not_of_their_bytes():
    net = quantised("nf4")
    total = sum(p.numel() for p in as_float(net).parameters())
    selection = unmask.select(net, unmask.id3("10%", steps=2))
    assert selection.budget == round(0.1 * total)
    assert selection.delta().metadata["parameters"] == total


def test_second_derivatives_are_refused():
    net = quantised("nf4")
    run(net, unmask.random_mask(10).but(scope=MATRICES), steps=1)
    x = data(0).requires_grad_()
    (grad,) = torch.autograd.grad(loss(net, x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
