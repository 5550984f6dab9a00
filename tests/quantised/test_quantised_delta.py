"""Checks a delta of a quantised base: stored values, applied next to the base, undone exactly, merged on request."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from quantised_nets import KINDS, as_float, data, loss, payload, quantised, whole
from torch import nn

import unmask
from unmask import DeltaError, SelectionError
from unmask.delta.base import base_tensors
from unmask.gradients.entries import take
from unmask.quantised import dequantise_and_merge, detach
from unmask.quantised.layers import has_sidecars, hook_of, weights
from unmask.quantised.tensor import QuantisedTensor


def trained(kind: str, steps: int = 4, **options: str) -> tuple[nn.Module, unmask.Selection, torch.optim.Optimizer]:
    net = quantised(kind)
    selection = unmask.select(net, unmask.id3(300, steps=4, stride=2), **options)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    train(net, optimizer, range(steps))
    return net, selection, optimizer


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss(net, data(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_applied_it_computes_bit_for_bit(kind, mode, tmp_path):
    net, selection, _ = trained(kind, dense=r"head\.weight")
    path = selection.delta("some/base").save(tmp_path / "delta.safetensors")
    fresh = quantised(kind)
    before, x = payload(fresh), data(30)
    getattr(net, mode)(), getattr(fresh, mode)()
    displaced = unmask.SparseDelta.load(path).apply(fresh)
    with torch.no_grad():
        assert torch.equal(fresh(x), net(x))
    assert payload(fresh).keys() == before.keys()
    for name in selection.indices:
        tensor = weights(fresh)[name]
        slots = selection.ledger.members(selection.ledger.layout.names.index(name)).slots
        if isinstance(tensor, QuantisedTensor):
            assert torch.equal(take(tensor, selection.indices[name]), selection.values.detach()[slots])
    displaced.apply(fresh)
    assert not has_sidecars(fresh)
    reference = quantised(kind)
    assert base_tensors(fresh).keys() == base_tensors(reference).keys()
    unmask.SparseDelta.load(path).apply(fresh, verify="full")  # this checks that it is the base again, bit for bit


def test_the_delta_names_the_kind_of_its_base():
    _, selection, _ = trained("nf4 nested")
    assert selection.delta().metadata["quantised"] == ["bitsandbytes nf4"]
    entry = selection.delta().sparse["up.weight"]
    assert (entry.values.dtype, entry.shape) == (torch.float32, (128, 64))


@pytest.mark.parametrize("other", ["fp4", "nf4 nested", "int8", "float"])
def test_another_quantisation_is_another_base(other):
    _, selection, _ = trained("nf4")
    target = as_float(quantised("nf4")) if other == "float" else quantised(other)
    with pytest.raises(DeltaError, match="is not the delta's base"):
        selection.delta().apply(target, verify="full")
    assert not has_sidecars(target)


def test_a_scale_is_part_of_the_fingerprint():
    _, selection, _ = trained("int8")
    target = quantised("int8")
    target.up.weight.SCB[3] *= 1.5
    with pytest.raises(DeltaError, match="is not the delta's base"):
        selection.delta().apply(target, verify="full")


def test_a_delta_on_top_of_a_delta():
    """The second one's base is the first one's result: sidecars count in fingerprints."""
    net, selection, _ = trained("nf4")
    first = selection.delta()
    selection.release()
    again = unmask.select(net, unmask.random_mask(200, seed=3))
    train(net, torch.optim.AdamW(again.parameters(), lr=1e-2), range(5, 8))
    second = again.delta()
    fresh = quantised("nf4")
    with pytest.raises(DeltaError, match="is not the delta's base"):
        second.apply(fresh, verify="full")
    undo_first = first.apply(fresh)
    undo_second = second.apply(fresh)
    torch.testing.assert_close(fresh(data(30)), net(data(30)), rtol=1e-6, atol=1e-6)
    undo_second.apply(fresh)
    undo_first.apply(fresh)
    assert torch.equal(fresh(data(30)), quantised("nf4")(data(30)))


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
def test_resume_continues_bit_for_bit(kind):
    through, whole_run, optimizer = trained(kind, steps=2)
    state = {"selection": whole_run.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}
    train(through, optimizer, range(2, 6))
    net = quantised(kind)
    selection = unmask.select(net, unmask.id3(300, steps=4, stride=2))
    resumed = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    selection.load_state_dict(state["selection"])
    resumed.load_state_dict(state["optimizer"])
    train(net, resumed, range(2, 6))
    assert torch.equal(selection.values, whole_run.values)
    assert torch.equal(net(data(30)), through(data(30)))


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
def test_release_keeps_the_trained_weights_and_detach_takes_them_off(kind):
    net, selection, _ = trained(kind, include=r"(up|down)\.weight")
    x = data(30)
    before = net(x).detach()
    with pytest.raises(SelectionError, match="release"):
        detach(net)
    selection.release()
    assert torch.equal(net(x), before)
    detach(net)
    assert hook_of(net.up) is None
    assert torch.equal(net(x), quantised(kind)(x))


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_copies_and_pickles_keep_the_current_weights_and_are_out_of_training(kind, travel):
    net, _, optimizer = trained(kind, include=r"(up|down)\.weight")
    expected = net(data(30)).detach()
    twin = travel(net)
    train(net, optimizer, range(1))
    assert not torch.equal(net(data(30)), expected)
    assert torch.equal(twin(data(30)), expected)
    detach(twin)
    assert torch.equal(twin(data(30)), quantised(kind)(data(30)))
    assert has_sidecars(net)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_ordinary_layers(kind):
    net, selection, _ = trained(kind)
    with pytest.raises(SelectionError, match="release"):
        dequantise_and_merge(net)
    selection.release()
    expected = as_float(net)
    before = net(data(30)).detach()
    assert dequantise_and_merge(net) is net
    assert type(net.up) is nn.Linear
    assert net.up.weight.dtype == torch.float32
    assert torch.equal(net.up.weight, expected.up.weight)
    torch.testing.assert_close(net(data(30)), before, rtol=1e-4, atol=1e-5)
    assert not has_sidecars(net)


def test_merging_a_layer_by_itself_and_in_bfloat16():
    layer = quantised("nf4").up
    expected = whole(weights(layer)["weight"])
    merged = dequantise_and_merge(layer, torch.bfloat16)
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, expected.bfloat16())
    assert merged.bias is layer.bias


def test_merging_leaves_nothing_quantised_behind():
    net = nn.Sequential(quantised("nf4"), pytest.importorskip("bitsandbytes").nn.EmbeddingNF4(64, 64).to("cpu"))
    with pytest.raises(SelectionError, match=r"cannot merge: '1.weight' is in bitsandbytes' EmbeddingNF4"):
        dequantise_and_merge(net)
