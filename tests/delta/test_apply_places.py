"""Checks what `apply` verifies: by default the base's values at the delta's places, on request the whole base."""

from __future__ import annotations

import copy
import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_same_tensors, batches, mlp, snapshot, train, trained, travelling
from peft_nets import OLD_NAMES, config, run
from quantised_nets import data, loss, quantised
from torch import nn

import peft
import unmask
import unmask.peft
from unmask import DeltaError, SparseDelta, SparseTensor
from unmask.delta import remembered
from unmask.delta.base import base_tensors
from unmask.delta.fingerprint import digest, fingerprint, fingerprint_at
from unmask.gradients.entries import take

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
METHODS = {
    "all at once": unmask.random_mask(60),
    "late slots": unmask.id3(60, steps=4),
    "leaving": unmask.repeat_d3(30),
    "kept": unmask.repeat_d3(30, leaving="kept"),
    "with a new head": unmask.id3(60, steps=4),
}


def at_places(delta: SparseDelta, base: nn.Module) -> str:
    """Returns the hash of a model's values at a delta's places."""
    tensors = base_tensors(base)
    held = {n: e.holding(take(tensors[n], e.indices)) for n, e in delta.sparse.items() if n not in delta.whole}
    return fingerprint_at(held)


def partly_trained(seed: int) -> tuple[nn.Module, nn.Module, SparseDelta]:
    """Returns (base, tuned, delta); the base is always the same, and two of its four layers are trained."""
    torch.manual_seed(0)
    base = mlp(depth=4)
    tuned = copy.deepcopy(base)
    selection = unmask.select(tuned, unmask.random_mask(20, seed=seed), include=rf"^[{seed}{seed + 4}]\.")
    train(tuned, torch.optim.SGD(selection.parameters(), lr=0.5), batches(3))
    return base, tuned, selection.delta()


# Where the hash comes from.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_selection_records_the_base_s_values_bit_for_bit(method, dtype):
    options = {"new": "^head"} if method == "with a new head" else {}
    base, _, selection = trained(dtype, METHODS[method], **options)
    delta = selection.delta()
    assert delta.places == at_places(delta, base) != ""


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4 nested", "torchao groups"])
def test_a_selection_of_quantised_weights_does_too(kind):
    model = quantised(kind)
    selection = unmask.select(model, unmask.id3(300, steps=4, stride=2))
    optimizer = torch.optim.SGD(selection.parameters(), lr=1.0)
    for step in range(4):
        loss(model, data(step)).backward()
        optimizer.step()
    delta = selection.delta()
    assert delta.places == at_places(delta, quantised(kind)) != ""


@pytest.mark.filterwarnings(OLD_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_does_too(dtype):
    model = peft.get_peft_model(travelling(dtype), config())
    run(model)
    delta = unmask.peft.delta(model)
    assert delta.places == at_places(delta, travelling(dtype)) != ""


def test_the_hash_is_the_one_that_the_docs_describe():
    """Computes it by docs/delta.md: a line for each tensor, of its name and a SHA-256 over dtype, shape, places and values."""
    model = nn.Linear(3, 2)
    model.weight.data = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
    model.bias.data = torch.tensor([7.0, 8.0])
    sparse = {
        "weight": SparseTensor(torch.tensor([1, 5]), torch.ones(2), (2, 3)),
        "bias": SparseTensor(torch.tensor([0]), torch.ones(1), (2,)),
    }
    expected = hashlib.sha256()
    for name, shape, places, values in [("bias", [2], [0], [7.0]), ("weight", [2, 3], [1, 5], [-2.0, -6.0])]:
        indices = hashlib.sha256(np.array(places, dtype="<i4").tobytes()).hexdigest()
        line = f"torch.float32 {shape} {indices} ".encode() + np.array(values, dtype="<f4").tobytes()
        expected.update(f"{name} {hashlib.sha256(line).hexdigest()}\n".encode())
    delta = SparseDelta(sparse, {}, "", places=f"sha256:{expected.hexdigest()}")
    assert delta.places == at_places(delta, model)
    displaced = delta.apply(model)
    assert model.weight.detach().flatten().tolist() == [1.0, 1.0, 3.0, 4.0, 5.0, 1.0]
    displaced.apply(model)
    assert model.weight.detach().flatten().tolist() == [1.0, -2.0, 3.0, 4.0, 5.0, -6.0]


def test_a_base_may_hold_nan_at_a_place():
    base, tuned = mlp(), mlp()
    base.load_state_dict(tuned.state_dict())
    for model in (base, tuned):
        model[0].bias.data.fill_(float("nan"))
    selection = unmask.select(tuned, unmask.random_mask(6), include=r"^0\.bias")
    with torch.no_grad(), selection.writing():
        selection.values.fill_(1.0)
    delta, before = selection.delta(), snapshot(base)
    displaced = delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))
    displaced.apply(base)
    assert_same_tensors(snapshot(base), before)


# The default.


def test_it_sees_another_value_at_a_place_and_leaves_the_model_as_it_was():
    base, _, selection = trained(torch.bfloat16)
    delta = selection.delta()
    name, entry = next(iter(delta.sparse.items()))
    tensor = base_tensors(base)[name]
    tensor.view(torch.int16).view(-1)[entry.indices[-1]] ^= 1
    before, versions = snapshot(base), [p._version for p in base.parameters()]
    with pytest.raises(DeltaError, match=r"not the delta's base, .*at the 60 places .* as it was before"):
        delta.apply(base)
    assert_same_tensors(snapshot(base), before)
    assert [p._version for p in base.parameters()] == versions


def test_a_refused_delta_leaves_a_graph_valid():
    base, _, selection = trained()
    x = batches(1)[0]
    expected = torch.autograd.grad(base(x).sum(), [base.scale])[0]
    out = base(x).sum()
    with pytest.raises(DeltaError, match="not the delta's base"):
        replace(selection.delta(), places="sha256:0").apply(base)
    assert torch.equal(torch.autograd.grad(out, [base.scale])[0], expected)


def test_it_does_not_see_what_the_base_holds_elsewhere():
    """A stated limitation: docs/delta.md says so, and ``verify="full"`` sees it."""
    base, _, selection = trained()
    delta = selection.delta()
    name, entry = next(iter(delta.sparse.items()))
    free = next(i for i in range(36) if i not in entry.indices.tolist())
    base_tensors(base)[name].view(-1)[free] += 1
    displaced = delta.apply(base)
    displaced.apply(base)
    with pytest.raises(DeltaError, match="not the delta's base"):
        delta.apply(base, verify="full")


def test_deltas_at_different_places_are_applied_one_after_the_other_and_taken_off_in_any_order():
    base, tuned, first = partly_trained(0)
    _, _, second = partly_trained(2)
    assert not first.sparse.keys() & second.sparse.keys()
    before = snapshot(base)
    undo = [first.apply(base), second.apply(base)]
    changed = {n: t for n, t in snapshot(tuned).items() if n in first.sparse}
    assert_same_tensors({n: t for n, t in snapshot(base).items() if n in changed}, changed)
    for displaced in undo:
        displaced.apply(base)
    assert_same_tensors(snapshot(base), before)


def test_it_reads_no_tensor_whole(monkeypatch):
    base, tuned, selection = trained(dense="head")
    delta = selection.delta()
    monkeypatch.setattr(remembered, "digest", None)
    delta.apply(base).apply(base)
    delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))


@pytest.mark.parametrize("case", ["full", "a head", "format 2"])
def test_a_delta_without_a_hash_of_places_is_checked_in_full(case):
    options = {"include": "head"} if case == "a head" else {}
    base, tuned, selection = trained(method=None if case == "format 2" else unmask.full(), **options)
    delta = selection.delta()
    if case == "format 2":
        delta = replace(delta, places="")
    assert delta.places == ""
    tensors = base_tensors(base)
    other = next((name for name in sorted(tensors) if name not in delta.whole), None)
    if other is not None:
        tensors[other].view(-1)[0] += 1
        with pytest.raises(DeltaError, match="not the delta's base: its fingerprint"):
            delta.apply(base)
        tensors[other].copy_(base_tensors(travelling())[other])
    delta.apply(base)
    assert_same_tensors(snapshot(base), snapshot(tuned))


def test_an_unknown_way_to_verify_is_refused():
    base, _, selection = trained()
    with pytest.raises(DeltaError, match="verify = 'none'; it must be 'places' or 'full'"):
        selection.delta().apply(base, verify="none")


# The displaced delta.


def test_its_places_are_what_was_written_and_its_base_is_known_after_a_full_check_only():
    base, tuned, selection = trained()
    delta = selection.delta()
    displaced = delta.apply(base)
    assert displaced.places == at_places(delta, tuned)
    assert displaced.base == ""
    with pytest.raises(DeltaError, match="does not say which base it belongs to"):
        displaced.apply(base, verify="full")
    displaced.apply(base)
    displaced = delta.apply(base, verify="full")
    held = {n: digest(t) for n, t in base_tensors(tuned).items() if n not in delta.whole}
    assert displaced.base == fingerprint(held)
    displaced.apply(base, verify="full")
    delta.apply(base, verify="full")


def test_entries_keep_what_is_known_of_their_places_for_themselves():
    entry = SparseTensor(torch.tensor([1, 4]), torch.tensor([1.0, 2.0]), (6,))
    delta = SparseDelta({"w": entry}, {}, "sha256:0")
    low, high, indices = entry.part(torch.device("cpu"), 2, 3)
    assert (low, high, indices.tolist()) == (1, 2, [2])
    assert entry.part(torch.device("cpu"), 2, 3)[2] is indices
    assert entry.holding(torch.zeros(2)).part(torch.device("cpu"), 2, 3)[2] is indices
    for other in (
        copy.deepcopy(delta).sparse["w"],
        pickle.loads(pickle.dumps(entry)),
        replace(entry, values=-entry.values),
    ):
        assert other.part(torch.device("cpu"), 2, 3)[2] is not indices
    assert replace(entry, values=-entry.values).digest != entry.digest == copy.deepcopy(entry).digest
    assert replace(entry, indices=torch.tensor([1, 5])).digest != entry.digest
    with pytest.raises(DeltaError, match="NaN"):
        SparseDelta({"w": replace(entry, values=entry.values * float("nan"))}, {}, "")
    broken = SparseTensor(torch.tensor([4, 1]), torch.tensor([1.0, 2.0]), (6,))
    for each in (broken, broken.holding(torch.zeros(2))):
        with pytest.raises(DeltaError, match="ascend"):
            SparseDelta({"w": each}, {}, "")


# The full check, and what it remembers.


@pytest.fixture
def hashed(monkeypatch):
    """Returns the shapes of the tensors that were hashed, in a list that grows."""
    shapes: list[tuple[int, ...]] = []

    def counting(tensor):
        shapes.append(tuple(tensor.shape))
        return digest(tensor)

    monkeypatch.setattr(remembered, "digest", counting)
    return shapes


def test_a_tensor_is_hashed_once_and_again_only_after_it_changed(hashed):
    model = mlp()
    tensors = base_tensors(model)
    expected = {name: digest(tensor) for name, tensor in tensors.items()}
    assert remembered.digests(model, tensors) == expected
    assert len(hashed) == 6
    assert remembered.digests(model, base_tensors(model)) == expected
    assert remembered.digests(nn.DataParallel(model), base_tensors(model)) == expected
    assert len(hashed) == 6
    assert remembered.digests(copy.deepcopy(model), tensors) == expected
    assert len(hashed) == 12  # another model


def _write(model):
    with torch.no_grad():
        model[0].weight[3, 4] += 1


def _load(model):
    model.load_state_dict({n: t + (n == "0.weight") for n, t in model.state_dict().items()})


def _replace(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)


def _set_data(model):
    model[0].weight.data = model[0].weight.detach() + 1


def _set_data_of_old_memory(model):
    """Gives the tensor other memory, and then memory at the old address, if the allocator hands it out again."""
    kept, old = model[0].weight.detach() + 1, model[0].weight.data_ptr()
    model[0].weight.data = torch.zeros_like(kept)
    for _ in range(100):
        model[0].weight.data = kept.clone()
        if model[0].weight.data_ptr() == old:
            break


def _merge_by_data(model):
    model[0].weight.data += 0.5  # as peft merges a LoRA; torch does not count it


def _cast(model):
    model[0].weight.data = model[0].weight.data.double()


def _transpose(model):
    model[0].weight.data = model[0].weight.data.t()


CHANGES = [_write, _load, _replace, _set_data, _set_data_of_old_memory, _merge_by_data, _cast, _transpose]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_remembered_is_never_stale(change):
    model = mlp()
    before = remembered.digests(model, base_tensors(model))
    change(model)
    after = remembered.digests(model, base_tensors(model))
    assert after == {name: digest(tensor) for name, tensor in base_tensors(model).items()}
    assert [name for name in before if before[name] != after[name]] == ["0.weight"]


def test_what_was_hashed_before_a_write_was_undone_is_forgotten(monkeypatch):
    """Undoing gives the tensors their old versions, so that the next write has the version of the one that was undone."""
    base, _, selection = trained()
    delta = selection.delta()
    monkeypatch.setattr(remembered, "_SAMPLED", 0)  # the sample would see it too
    remembered.digests(base, base_tensors(base))
    hashing = remembered.digest
    names = [name for name in base_tensors(base) if name in delta.sparse]
    last = base_tensors(base)[names[-1]].data_ptr()

    def interrupted(tensor):
        if tensor.data_ptr() == last:
            raise KeyboardInterrupt
        return hashing(tensor)

    monkeypatch.setattr(remembered, "digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        delta.apply(base, verify="full")
    monkeypatch.setattr(remembered, "digest", hashing)
    for name in names:
        base_tensors(base)[name].put_(torch.tensor([0]), torch.tensor([9.0]))  # one write
    tensors = base_tensors(base)
    assert remembered.digests(base, tensors) == {name: digest(tensor) for name, tensor in tensors.items()}


def test_a_full_check_hashes_the_base_once(hashed):
    base, tuned, selection = trained()
    delta = selection.delta()
    count = len([name for name in base_tensors(base) if name not in delta.whole])
    displaced = delta.apply(base, verify="full")
    assert len(hashed) == count + len(delta.sparse)  # the base, and then what was written
    displaced.apply(base, verify="full")
    delta.apply(base, verify="full")
    assert len(hashed) == count + 3 * len(delta.sparse)
    with pytest.raises(DeltaError, match="not the delta's base"):
        delta.apply(base, verify="full")
    assert len(hashed) == count + 3 * len(delta.sparse)
    assert_same_tensors(snapshot(base), snapshot(tuned))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_tensors_of_every_kind_are_remembered_or_hashed_again(hashed):
    plain = torch.arange(6.0).view(2, 3)
    kinds = {
        "empty": torch.zeros(0, 4),
        "a number": torch.tensor(2.0),
        "flags": torch.tensor([True, False]),
        "complex": torch.complex(plain, plain).conj(),
        "turned": plain.t(),
        "expanded": torch.zeros(1).expand(3),
        "large": torch.zeros(3000, dtype=torch.int8),
        "coo": plain.to_sparse(),
        "csr": plain.to_sparse_csr(),
    }
    model = nn.Module()
    expected = {name: digest(tensor) for name, tensor in kinds.items()}
    assert remembered.digests(model, kinds) == expected
    count = len(hashed)
    assert remembered.digests(model, kinds) == expected
    assert len(hashed) == count + 2  # those that are stored sparse
    kinds["large"][-1] = 1
    kinds["complex"].mul_(2)
    changed = remembered.digests(model, kinds)
    assert changed == {name: digest(tensor) for name, tensor in kinds.items()}
    assert {name for name in kinds if changed[name] != expected[name]} == {"large", "complex"}


def test_tensors_without_a_version_are_hashed_every_time():
    with torch.inference_mode():
        model = mlp()
        tensors = base_tensors(model)
        before = remembered.digests(model, tensors)
        model[0].weight[0, 0] += 1
        assert remembered.digests(model, tensors)["0.weight"] != before["0.weight"]
    model = quantised("int8")
    before = remembered.digests(model, base_tensors(model))
    model.up.weight.SCB[3] *= 1.5
    assert remembered.digests(model, base_tensors(model))["up.weight"] != before["up.weight"]
