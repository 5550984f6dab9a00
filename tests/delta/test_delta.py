"""Checks that a delta is exact and reversible, and that applying one that does not fit changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, assert_same_tensors, batches, id3_run, mlp, snapshot, train, trained, travelling
from torch import nn

import unmask
from unmask import DeltaError, SparseDelta, files

METHODS = [unmask.id3(60, steps=3), unmask.repeat_d3(60), unmask.pafi("100%"), unmask.bitfit(), unmask.full()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_round_trip_is_bitwise_and_undoing_it_too(method, dtype, tmp_path):
    base, tuned, selection = trained(dtype, method)
    before = snapshot(base)
    delta = SparseDelta.load(selection.delta().save(tmp_path / "delta.safetensors"))
    displaced = delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))
    assert len(delta) == (0 if method.whole else selection.used)
    again = SparseDelta.load(displaced.save(tmp_path / "displaced.safetensors")).apply(base)
    assert_same_tensors(snapshot(base), before)
    again.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))


def test_round_trip_in_a_fresh_process(tmp_path):
    base, tuned, selection = trained(torch.bfloat16, dense="head")
    selection.delta().save(tmp_path / "delta.safetensors")
    torch.save(base.state_dict(), tmp_path / "base.pt")
    script = (
        "import sys, torch, unmask; sys.path.insert(0, sys.argv[2]); from helpers import travelling; from pathlib import Path\n"
        "folder = Path(sys.argv[1]); model = travelling(torch.bfloat16, seed=5)\n"
        "model.load_state_dict(torch.load(folder / 'base.pt'))\n"
        "unmask.SparseDelta.load(folder / 'delta.safetensors').apply(model)\n"
        "torch.save(model.state_dict(), folder / 'tuned.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path, ROOT / "tests" / "support"], check=True)
    assert_same_tensors(snapshot(tuned), dict(torch.load(tmp_path / "tuned.pt")))


def test_running_statistics_travel():
    base, tuned, selection = trained()
    delta = selection.delta()
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} == set(delta.whole)
    delta.apply(base)
    torch.testing.assert_close(base.eval()(batches(1)[0]), tuned.eval()(batches(1)[0]), rtol=0, atol=0)


def test_new_tensors_travel_with_their_unselected_initial_values():
    """Checks a head that the base checkpoint lacks: a fresh process draws another one."""
    base, tuned, selection = trained(method=unmask.id3(9, steps=3), new="^head")
    selected = selection.indices.get("head.weight", torch.empty(0))
    assert selected.numel() < base.head.weight.numel()
    nn.init.normal_(base.head.weight)
    nn.init.normal_(base.head.bias)
    selection.delta().apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))


def test_a_tied_tensor_is_stored_once_and_stays_tied():
    base, _, selection = trained(method=unmask.random_mask("90%"))
    delta = selection.delta()
    assert "embed.weight" in delta.sparse
    assert "out.weight" not in {*delta.sparse, *delta.whole}
    delta.apply(base)
    assert base.out.weight is base.embed.weight


def test_an_untrained_selections_delta_changes_nothing():
    model = mlp()
    selection = unmask.select(model, unmask.id3(5, steps=2))
    delta = selection.delta()
    base = mlp()
    base.load_state_dict(model.state_dict())
    delta.apply(base)
    assert len(delta) == delta.whole_numel == 0
    assert_same_tensors(snapshot(model), snapshot(base))


def test_plain_indices_cost_four_bytes_and_the_metadata_describe_the_run(saved, tmp_path):
    delta = SparseDelta.load(saved[1])
    tensors, header = files.read_tensors(delta.save(tmp_path / "plain.safetensors", compress=False))
    assert {t.dtype for key, t in tensors.items() if key.endswith("::indices")} == {torch.int32}
    metadata = delta.metadata
    assert (metadata["base_id"], metadata["budget"], metadata["used"], metadata["step"]) == ("some/base", 60, 60, 4)
    assert (metadata["method"]["name"], metadata["dense"]) == ("id3", ["head.bias", "head.weight"])
    assert json.loads(json.dumps(header)) == header


# Refusals, which leave the model bitwise unchanged.


def assert_refused(delta, model, match):
    before = snapshot(model)
    with pytest.raises(DeltaError, match=match):
        delta.apply(model)
    assert_same_tensors(before, snapshot(model))


def test_another_base_is_refused(saved):
    assert_refused(SparseDelta.load(saved[1]), travelling(seed=1), "not the delta's base")


def test_one_flipped_bit_in_an_untouched_weight_of_the_base_is_refused(saved):
    base, path, _ = saved
    delta = SparseDelta.load(path)
    free = next(i for i in range(36) if i not in delta.sparse["turned"].indices.tolist())
    base.turned.data.view(torch.int32)[free // 6, free % 6] ^= 1
    assert_refused(delta, base, "not the delta's base")


def test_applying_twice_is_refused(saved):
    base, path, _ = saved
    delta = SparseDelta.load(path)
    delta.apply(base)
    assert_refused(delta, base, "already applied")


def test_another_dtype_is_refused_with_what_to_do(saved):
    assert_refused(SparseDelta.load(saved[1]), travelling(torch.bfloat16), r"load the base with dtype=torch.float32")


@pytest.mark.parametrize("name", ["head", "turned"])
def test_another_shape_is_refused(saved, name):
    model = travelling()
    if name == "head":
        model.head = nn.Linear(9, 3)
    else:
        model.turned = nn.Parameter(torch.randn(6, 7))
    assert_refused(SparseDelta.load(saved[1]), model, "has shape")


def test_a_model_that_lacks_a_tensor_is_refused(saved):
    model = travelling()
    del model.head
    assert_refused(SparseDelta.load(saved[1]), model, r"no tensor 'head.bias' \(nor 1 more\)")


def test_a_model_with_one_tensor_more_is_refused(saved):
    model = travelling()
    model.extra = nn.Parameter(torch.zeros(1))
    assert_refused(SparseDelta.load(saved[1]), model, "not the delta's base")


def test_a_live_selection_is_refused(saved):
    base, path, _ = saved
    unmask.select(base, unmask.id3(3, steps=1))
    assert_refused(SparseDelta.load(path), base, r"release\(\)")


def test_a_delta_is_frozen_and_taking_it_does_not_stop_the_run():
    model = mlp()
    selection, optimizer = id3_run(model)
    train(model, optimizer, batches(2))
    delta = selection.delta()
    kept = {name: entry.values.clone() for name, entry in delta.sparse.items()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        delta.base = "sha256:1"
    train(model, optimizer, batches(3))
    assert_same_tensors(kept, {name: entry.values for name, entry in delta.sparse.items()})
    assert selection.step == 5
    assert copy.deepcopy(delta).base == delta.base == selection.delta().base
