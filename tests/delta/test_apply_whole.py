"""Checks that `apply` writes all of a delta or nothing, and that NaN and -0.0 which training did not touch do no harm."""

from __future__ import annotations

import hashlib
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same_tensors, batches, snapshot, train, trained, travelling
from peft_nets import OLD_NAMES, base_state, config, run
from quantised_nets import WIDTH, quantised
from torch import Tensor, nn

import peft
import unmask
import unmask.delta.exchange as exchange_module
import unmask.peft
from unmask import DeltaError, SparseDelta
from unmask.delta import fingerprint
from unmask.delta.base import base_tensors
from unmask.delta.fingerprint import same_bits, same_entries
from unmask.delta.writable import find_unwritable

NAN = float("nan")


@pytest.fixture
def made() -> tuple[nn.Module, nn.Module, SparseDelta]:
    """Returns (base, tuned, delta); the delta has a part of the body, a dense head and running statistics."""
    base, tuned, selection = trained(dense="head")
    return base, tuned, selection.delta()


# Tensors that cannot be written.


def expanded(tensor: Tensor, folder: Path) -> Tensor:
    return tensor.reshape(-1)[:1].clone().expand(tensor.numel()).view(tensor.shape)


def overlapping(tensor: Tensor, folder: Path) -> Tensor:
    return torch.zeros(2 * tensor.numel()).as_strided(tensor.shape, (1,) * tensor.ndim)


def inferred(tensor: Tensor, folder: Path) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def mapped(tensor: Tensor, folder: Path) -> Tensor:
    """Returns a copy in memory that may only be read: a write would end the process."""
    file = folder / "weights"
    file.write_bytes(tensor.numpy().tobytes())
    with file.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return torch.from_numpy(np.frombuffer(memory, dtype=np.float32)).view(tensor.shape)


def on_meta(tensor: Tensor, folder: Path) -> Tensor:
    return tensor.to("meta")


linux = pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
STUCK = [
    ("several entries", expanded),
    ("several entries", overlapping),
    ("inference_mode", inferred),
    pytest.param("memory map", mapped, marks=linux),
    ("meta device", on_meta),
]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("place", ["body.2.weight", "head.weight"], ids=["in part", "whole"])
@pytest.mark.parametrize(("reason", "make"), STUCK)
def test_a_tensor_that_cannot_be_written_is_refused_before_any_is(made, place, reason, make, tmp_path):
    base, _, delta = made
    assert place in {*delta.sparse, *delta.whole}
    owner = base.get_submodule(place.removesuffix(".weight"))
    owner.weight = nn.Parameter(make(owner.weight.detach(), tmp_path), requires_grad=False)
    before = {n: t.detach().clone() for n, t in base.named_parameters() if n != place}
    with pytest.raises(DeltaError, match=rf"'{place}' cannot be written: it .*{reason}.*Nothing was changed"):
        delta.apply(base)
    assert_same_tensors(before, {n: t.detach() for n, t in base.named_parameters() if n != place})


def test_tensors_that_can_be_written_are_not_refused():
    strides = torch.arange(24.0)
    views = {
        "transposed": strides.view(4, 6).t(),
        "every other": strides[::2],
        "a window": strides.view(4, 6)[1:3, 2:4],
        "one row": torch.zeros(1).expand(1, 1),
        "interleaved": strides.as_strided((2, 3), (3, 2)),
        "empty": torch.zeros(1).expand(0, 1),
        "a number": torch.tensor(1.0),
    }
    assert find_unwritable(views) is None
    for view in views.values():
        view.copy_(torch.zeros(view.shape))  # torch can write it too
    assert find_unwritable({"overlapping": strides.as_strided((2, 3), (2, 1))}) is not None
    with torch.inference_mode():
        assert find_unwritable({"inferred": torch.zeros(2)}) is None


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_failure_in_the_middle_is_undone(made, failing, error, monkeypatch):
    base, tuned, delta = made
    before, calls, put = snapshot(base), [], exchange_module.put

    def fails_once(*args):
        calls.append(args)
        if len(calls) == failing + 1:
            put(*args)  # the worst case: the tensor is written before the error
            raise error
        put(*args)

    assert len(delta.sparse) >= 5
    monkeypatch.setattr(exchange_module, "put", fails_once)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DeltaError) as caught:
        delta.apply(base)
    assert_same_tensors(before, snapshot(base))
    if isinstance(error, RuntimeError):
        assert caught.match("could not be written: out of memory. The model is as it was before")
    delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))


def test_a_tensor_that_refuses_for_good_leaves_the_others_as_they_were(made, monkeypatch):
    base, _, delta = made
    before, put, stuck = snapshot(base), exchange_module.put, base.turned.data_ptr()

    def refuses(tensor, *args):
        if tensor.data_ptr() == stuck:
            raise RuntimeError("a driver's error")
        put(tensor, *args)

    monkeypatch.setattr(exchange_module, "put", refuses)
    with pytest.raises(DeltaError, match="'turned' could not be written: a driver's error"):
        delta.apply(base)
    assert_same_tensors(before, snapshot(base))


def test_a_failure_with_quantised_weights_is_undone_too(monkeypatch):
    model, base = quantised("int8"), quantised("int8")
    selection = unmask.select(model, unmask.random_mask(40))
    model(batches(1, width=WIDTH)[0]).square().mean().backward()
    torch.optim.SGD(selection.parameters(), lr=1.0).step()
    delta = selection.delta()
    assert len(delta.sparse) > 1
    put, calls = exchange_module.put, []

    def fails_last(*args):
        calls.append(args)
        put(*args)
        if len(calls) == len(delta.sparse):
            raise RuntimeError("late")

    x = batches(1, width=WIDTH)[0]
    out = base(x)
    monkeypatch.setattr(exchange_module, "put", fails_last)
    with pytest.raises(DeltaError, match="late"):
        delta.apply(base)
    assert torch.equal(base(x), out)
    delta.apply(base)
    assert not torch.equal(base(x), out)


# NaN and -0.0.


@pytest.mark.parametrize("value", [NAN, float("inf"), -0.0])
def test_the_values_of_the_models_own_new_head_are_displaced_and_come_back(made, value):
    base, tuned, delta = made
    base.head.weight.data.fill_(value)
    before = snapshot(base)
    displaced = delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))
    displaced.apply(base)
    assert_same_tensors(snapshot(base), before)


@pytest.mark.parametrize("value", [NAN, -0.0])
@pytest.mark.parametrize("name", ["mask", "kept"])
def test_an_untouched_buffer_or_weight_is_no_obstacle(name, value, tmp_path):
    def make() -> nn.Module:
        model = travelling()
        model.register_buffer("mask", torch.ones(3))
        model.register_parameter("kept", nn.Parameter(torch.ones(3)))
        getattr(model, name).data[1] = value
        return model.eval()

    base, tuned = make(), make()
    selection = unmask.select(tuned, unmask.id3(20, steps=2), include="body")
    train(tuned, torch.optim.SGD(selection.parameters(), lr=0.1), batches(2))
    assert not selection.state_dict()["buffers"]
    delta = SparseDelta.load(selection.delta().save(tmp_path / "delta.safetensors"))
    assert not delta.whole
    delta.apply(base).apply(base)
    assert_same_tensors(snapshot(base), snapshot(make()))
    state = selection.state_dict()
    other = unmask.select(make(), unmask.id3(20, steps=2), include="body")
    other.load_state_dict(state)
    assert_same_tensors(snapshot(other.model), snapshot(tuned))


@pytest.mark.parametrize("where", ["new", "dense"])
def test_nan_in_a_new_tensor_travels_if_training_did_not_make_it(where, tmp_path):
    base, tuned = travelling(), travelling()
    tuned.head.bias.data[1] = NAN
    selection = unmask.select(tuned, unmask.pafi(20), include="body", **{where: r"^head\.bias"})
    if where == "dense":
        with pytest.raises(DeltaError, match=r"'head\.bias' holds NaN or infinite values: training has diverged"):
            selection.delta()
        return
    delta = SparseDelta.load(selection.delta().save(tmp_path / "delta.safetensors"))
    delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))


def test_zero_that_turned_into_minus_zero_is_a_change():
    base, tuned = travelling(), travelling()
    selection = unmask.select(tuned, unmask.pafi(20), include="body")
    tuned.norm.running_mean.neg_()
    delta = selection.delta()
    assert set(delta.whole) == {"norm.running_mean"}
    delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))


@pytest.mark.filterwarnings(OLD_NAMES)
def test_an_adapter_s_untouched_buffer_may_hold_nan():
    def make() -> nn.Module:
        model = travelling()
        model.register_buffer("mask", torch.full((2,), NAN))
        return model

    model, base = peft.get_peft_model(make(), config()).eval(), make()
    run(model)
    delta = unmask.peft.delta(model)
    assert not delta.whole
    delta.apply(base)
    assert_same_tensors(snapshot(base), base_state(model))


# The comparison and the fingerprint.


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (4, 3)])
def test_bits_are_compared_for_any_shape_and_dtype(dtype, shape):
    tensor = torch.ones(shape, dtype=dtype)
    assert same_bits(tensor, tensor.clone())
    assert same_entries(tensor, tensor).all()
    assert not same_bits(tensor, tensor.unsqueeze(0))
    assert not same_bits(tensor, tensor.to(torch.uint8))
    if tensor.numel():
        other = tensor.clone()
        other.view(-1)[-1] = 0
        assert not same_bits(tensor, other)
        assert int(same_entries(tensor, other).sum()) == tensor.numel() - 1
    if tensor.is_floating_point() and tensor.numel():
        assert same_bits(tensor * NAN, tensor * NAN)
        assert not same_bits(tensor * 0.0, tensor * -0.0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_bits_of_views_and_of_other_kinds_of_tensors():
    tensor = torch.arange(6.0).view(2, 3)
    assert same_bits(tensor.t(), tensor.t().contiguous())
    assert same_bits(torch.complex(tensor, -tensor), torch.complex(tensor, tensor).conj())
    assert not same_bits(torch.complex(tensor, tensor), torch.complex(tensor, -tensor))
    for layout in (torch.sparse_coo, torch.sparse_csr):
        assert same_bits(tensor.to_sparse(layout=layout), tensor.to_sparse(layout=layout))
        assert not same_bits(tensor.to_sparse(layout=layout), (tensor * 2).to_sparse(layout=layout))


class Parts(nn.Module):
    """Holds every kind of tensor that a fingerprint covers or leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        self.tied = self.weight
        self.number, self.empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("kept", torch.tensor([True, False]))
        self.register_buffer("same", self.kept)
        self.register_buffer("passing", torch.zeros(2), persistent=False)


def test_the_fingerprint_is_the_one_that_the_docs_describe():
    """Computes the fingerprint by docs/delta.md: SHA-256 over names and digests, each of a dtype, a shape and bytes."""
    expected = hashlib.sha256()
    parts = [
        ("empty", "torch.float32", [0, 4], b""),
        ("kept", "torch.bool", [2], b"\x01\x00"),
        ("number", "torch.float32", [], np.float32(2).astype("<f4").tobytes()),
        ("weight", "torch.float32", [3, 2], np.array([[0, 3], [1, 4], [2, 5]], dtype="<f4").tobytes()),
    ]
    for name, dtype, shape, data in parts:
        digest = hashlib.sha256(f"{dtype} {shape} ".encode() + data).hexdigest()
        expected.update(f"{name} {digest}\n".encode())
    model = Parts()

    def mark() -> str:
        return fingerprint.fingerprint({n: fingerprint.digest(t) for n, t in base_tensors(model).items()})

    assert mark() == f"sha256:{expected.hexdigest()}"
    model.passing += 1  # no checkpoint holds it
    assert mark() == f"sha256:{expected.hexdigest()}"
    for name in ("weight", "number", "kept"):
        model = Parts()
        getattr(model, name).data.zero_()
        assert mark() != f"sha256:{expected.hexdigest()}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int16, torch.bool, torch.complex64])
def test_the_fingerprint_does_not_depend_on_the_machine_s_byte_order(dtype, monkeypatch):
    """Reverses the bytes of each number, as a machine has them that keeps the most significant byte first."""
    tensor = torch.tensor([1, 0, 3]).to(dtype)
    expected = bytes(fingerprint.tensor_bytes(tensor))
    size = tensor.element_size() // (2 if dtype.is_complex else 1)
    reversed_bytes = tensor.view(torch.uint8).view(-1, size).flip(1).reshape(-1)
    monkeypatch.setattr(sys, "byteorder", "big")
    assert bytes(fingerprint.tensor_bytes(reversed_bytes.view(dtype))) == expected
