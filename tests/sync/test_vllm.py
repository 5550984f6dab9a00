"""Tests what is handed to vLLM against the fields and rules that its documentation gives. vLLM itself is not run here.

`vllm_stand_in.Engine` stands in for it.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn
from vllm_stand_in import Engine, Patch, Served, check

import unmask
from unmask import MissingExtraError, SyncError
from unmask.sync import VLLM, PatchArguments, to_vllm_patches

LARGE = 1 << 20
FIELDS = ("name", "indices", "values", "full_shape")


class Net(nn.Module):
    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.head = nn.Linear(6, 4)
        self.to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.q(x) * self.k(x) + self.v(x)))


METHODS = {
    "random_mask": lambda: unmask.random_mask(20),
    "static_d3": lambda: unmask.static_d3(20),
    "id3": lambda: unmask.id3(20, steps=4),
    "repeat_d3": lambda: unmask.repeat_d3(20),
}


def step(model, optimizer, seed):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).to(model.q.weight.dtype)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(dtype=torch.float32, **options):
    model = Net(dtype)
    selection = unmask.select(model, unmask.id3(20, steps=3).but(scope=unmask.Scope()), **options)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for seed in range(3):
        step(model, optimizer, seed)
    return model, selection


def assert_same(served, model):
    for name, tensor in served.checkpoint.items():
        ours = dict(model.named_parameters())[name].detach()
        assert torch.equal(tensor.view(torch.uint8), ours.contiguous().view(torch.uint8)), name


# The form of a patch.


def test_the_arguments_are_the_documented_fields_of_a_patch():
    assert tuple(PatchArguments.__annotations__) == FIELDS == tuple(f.name for f in dataclasses.fields(Patch))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_arguments_are_those_of_the_installed_vllm():
    from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch

    assert {field.name for field in dataclasses.fields(SparseWeightPatch)} == set(FIELDS)


# A delta.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [12, 50, LARGE])
@pytest.mark.parametrize("dense", [None, "head"])
def test_the_patches_of_a_delta_make_the_trained_model_and_those_of_the_displaced_one_the_base(
    dtype, chunk_bytes, dense
):
    model, selection = trained(dtype, dense=dense)
    base, delta = Net(dtype), selection.delta()
    served, tuned = Served(base), copy.deepcopy(base)
    engine = Engine(served)
    displaced = delta.apply(tuned)
    for change, result in ((delta, tuned), (displaced, base)):
        chunks = list(to_vllm_patches(change, chunk_bytes))
        for chunk in chunks:
            assert sum(patch["indices"].nbytes + patch["values"].nbytes for patch in chunk) <= chunk_bytes
            engine.send_weight_chunk([Patch(**patch) for patch in chunk])
        entries = 20 + (28 if dense else 0)
        assert sum(patch["values"].numel() for chunk in chunks for patch in chunk) == entries
        assert (len(chunks) == 1) == (chunk_bytes == LARGE)
        assert_same(served, result)
    assert_same(Served(tuned), model)


def test_a_tensor_with_strides_is_handed_over_in_row_major_order():
    whole = torch.arange(6.0).view(2, 3).t()
    [[patch]] = to_vllm_patches(unmask.SparseDelta({}, {"head.weight": whole}, ""))
    assert patch["values"].tolist() == [0, 3, 1, 4, 2, 5]
    assert patch["full_shape"] == (3, 2)
    check(Patch(**patch))


def test_a_tensor_that_the_base_lacks_comes_with_its_trained_entries_over_it():
    entry = unmask.SparseTensor(torch.tensor([1]), torch.tensor([9.0]), (3,))
    [[patch]] = to_vllm_patches(unmask.SparseDelta({"head.bias": entry}, {"head.bias": torch.arange(3.0)}, ""))
    assert patch["values"].tolist() == [0, 9, 2]


def test_what_no_patch_can_hold_is_refused():
    large = unmask.SparseTensor(torch.tensor([5]), torch.tensor([1.0]), (2**16, 2**15 + 1))
    fits = unmask.SparseTensor(torch.tensor([2**31 - 1]), torch.tensor([1.0]), (2**16, 2**15))
    [[patch]] = to_vllm_patches(unmask.SparseDelta({"w": fits}, {}, ""))
    assert patch["indices"].tolist() == [2**31 - 1]
    for delta, message in (
        (unmask.SparseDelta({"w": large}, {}, ""), "2,147,549,184 entries"),
        (unmask.SparseDelta({}, {"steps": torch.ones(3, dtype=torch.int64)}, ""), "'steps' is torch.int64"),
        (unmask.SparseDelta({}, {"mean": torch.tensor([1.0, torch.nan])}, ""), "'mean' holds NaN"),
    ):
        with pytest.raises(SyncError, match=message):
            list(to_vllm_patches(delta))
    with pytest.raises(SyncError, match="chunk_bytes = 11"):
        to_vllm_patches(unmask.SparseDelta({}, {}, ""), 11)


# A publisher.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [16, LARGE])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dense", [None, "head"])
def test_vllm_holds_the_trainers_weights_after_every_step(method, dtype, chunk_bytes, dense):
    model = Net(dtype)
    engine = Engine(Served(model))
    selection = unmask.select(model, METHODS[method](), dense=dense)
    publisher = unmask.sync.Publisher(selection, VLLM(engine, chunk_bytes, "cpu", Patch))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for seed in range(4):
        step(model, optimizer, seed)
        engine.calls.clear()
        publisher.publish()
        chunks = len(engine.calls) - 2
        assert engine.calls == (["whole"] if chunk_bytes == LARGE else ["start", *["chunk"] * chunks, "finish"])
        assert_same(engine.served, model)


def test_the_patches_of_a_publisher_are_its_current_weights():
    model, selection = trained(dense="head")
    engine = Engine(Served(Net()))
    publisher = unmask.sync.Publisher(selection, unmask.sync.InProcess())
    [chunk] = to_vllm_patches(publisher)
    engine.send_weights([Patch(**patch) for patch in chunk])
    assert_same(engine.served, model)
    assert publisher.version == 0


def test_a_tensor_that_the_base_lacks_is_sent_whole_with_the_first_message():
    model = Net()
    other = copy.deepcopy(model)
    nn.init.zeros_(other.head.weight)
    engine = Engine(Served(other))
    selection = unmask.select(model, unmask.random_mask(30), new="head.weight")
    publisher = unmask.sync.Publisher(selection, VLLM(engine, LARGE, "cpu", Patch))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for seed in range(2):
        step(model, optimizer, seed)
        publisher.publish()
        assert_same(engine.served, model)
    assert 0 < selection.indices["head.weight"].numel() < model.head.weight.numel()


@pytest.mark.parametrize("fails_at", [0, 1, 6, 12])  # the first patches restore base values
def test_after_a_failure_the_next_update_puts_everything_right(fails_at):
    """repeat_d3 picks other weights in each step, so those that joined in the failed update must go back to the base."""
    model = Net()
    engine = Engine(Served(model))
    selection = unmask.select(model, METHODS["repeat_d3"]())
    publisher = unmask.sync.Publisher(selection, VLLM(engine, 16, "cpu", Patch))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    step(model, optimizer, 0)
    publisher.publish()
    seen = [selection.indices]
    for seed in (1, 2):
        step(model, optimizer, seed)
        engine.fails_at = fails_at
        engine.calls.clear()
        with pytest.raises(SyncError, match="version 2: a worker died"):
            publisher.publish()
        assert engine.calls[0] == "start"
        assert "finish" not in engine.calls
        seen.append(selection.indices)
    step(model, optimizer, 3)
    assert publisher.publish().version == 2
    assert_same(engine.served, model)
    places = [{(name, i) for name, flat in each.items() for i in flat.tolist()} for each in (*seen, selection.indices)]
    assert (places[1] | places[2]) - places[0] - places[3], "some joined in a failed update, and left"


def test_a_second_publisher_is_refused():
    transport = VLLM(Engine(Served(Net())), device="cpu", patch=Patch)
    _, selection = trained()
    unmask.sync.Publisher(selection, transport).publish()
    with pytest.raises(SyncError, match="another publisher"):
        unmask.sync.Publisher(selection, transport).publish()


def test_vllm_is_the_only_receiver():
    with pytest.raises(SyncError, match="another publisher's transport"):
        unmask.sync.Receiver(Net(), VLLM(Engine(Served(Net())), device="cpu", patch=Patch))


# The version of vLLM.


@dataclasses.dataclass
class OlderPatch:
    name: str
    indices: torch.Tensor
    values: torch.Tensor


@pytest.fixture
def vllm(monkeypatch):
    """Puts an empty module in the place of vLLM's."""
    names = ["vllm", "vllm.distributed", "vllm.distributed.weight_transfer"]
    names.append(f"{names[-1]}.sparse_nccl_engine")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return sys.modules[names[-1]]


def test_a_vllm_without_sparse_patches_is_refused(vllm):
    with pytest.raises(MissingExtraError, match="cannot be imported"):
        VLLM(Engine(Served(Net())), device="cpu")


def test_a_vllm_whose_patches_have_other_fields_is_refused(vllm):
    vllm.SparseWeightPatch = dataclasses.make_dataclass("SparseWeightPatch", FIELDS[:3])
    with pytest.raises(SyncError, match="fields name, indices, values, and"):
        VLLM(Engine(Served(Net())), device="cpu")


def test_the_patches_are_of_vllms_own_class(vllm):
    vllm.SparseWeightPatch = dataclasses.make_dataclass("SparseWeightPatch", FIELDS)
    engine, handed = Engine(Served(Net())), []
    engine.send_weights = handed.extend
    _, selection = trained()
    unmask.sync.Publisher(selection, VLLM(engine, device="cpu")).publish()
    assert {type(patch) for patch in handed} == {vllm.SparseWeightPatch}
