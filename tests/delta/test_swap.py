"""Checks that a swap is undoing one delta and applying another, bit for bit, or nothing at all."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same_tensors, batches, snapshot, train, travelling
from quantised_nets import data, loss, payload, quantised
from torch import nn

import unmask
import unmask.delta.exchange as exchange_module
from unmask import DeltaError, SparseDelta, SparseTensor
from unmask.delta.base import base_tensors
from unmask.delta.fingerprint import fingerprint_at

METHODS = {
    "other places": (unmask.random_mask(60, seed=1), unmask.random_mask(40, seed=2), {}),
    "the same places": (unmask.random_mask(60, seed=1), unmask.random_mask(60, seed=1), {}),
    "a part in common": (unmask.pafi(60), unmask.id3(80, steps=4), {}),
    "tensors in whole": (unmask.pafi(60), unmask.id3(80, steps=4), {"dense": "head"}),
    "a new head": (unmask.pafi(60), unmask.id3(80, steps=4), {"new": "head"}),
}


def tuned(method: unmask.Method, dtype: torch.dtype = torch.float32, lr: float = 0.1, **options: str) -> SparseDelta:
    """Returns a delta of the base ``travelling(dtype)``."""
    model = travelling(dtype)
    selection = unmask.select(model, method, **options)
    train(model, torch.optim.AdamW(selection.parameters(), lr=lr), batches(4, dtype=dtype))
    return selection.delta()


def after(*deltas: SparseDelta, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Returns the base's tensors with deltas applied one after the other."""
    base = travelling(dtype)
    for delta in deltas:
        delta.apply(base)
    return snapshot(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", METHODS)
def test_a_swap_is_undoing_one_delta_and_applying_the_other(case, dtype):
    one, two, options = METHODS[case]
    first, second = tuned(one, dtype, **options), tuned(two, dtype, lr=0.2, **options)
    base = travelling(dtype)
    displaced = first.apply(base)
    for delta in (second, first, first, second):
        displaced = unmask.swap(base, displaced, delta)
        assert_same_tensors(snapshot(base), after(delta, dtype=dtype))
    displaced.apply(base)
    assert_same_tensors(snapshot(base), snapshot(travelling(dtype)))


def test_a_swap_leaves_a_third_delta_in_place():
    def made(include: str, seed: int) -> SparseDelta:
        delta = tuned(unmask.random_mask(12, seed=seed), include=include)
        return SparseDelta(
            delta.sparse, {}, "", places=delta.places
        )  # without the running statistics, which all change

    one, two, other = made(r"body\.0", 1), made(r"body\.0", 2), made("turned|scale", 3)
    base = travelling()
    displaced = one.apply(base)
    undo_other = other.apply(base)
    displaced = unmask.swap(base, displaced, two)
    assert_same_tensors(snapshot(base), after(two, other))
    undo_other.apply(base)
    displaced.apply(base)
    assert_same_tensors(snapshot(base), snapshot(travelling()))


def test_quantised_weights_are_swapped_next_to_their_layers():
    def made(seed: int) -> SparseDelta:
        model = quantised("nf4")
        selection = unmask.select(model, unmask.random_mask(200, seed=seed))
        optimizer = torch.optim.SGD(selection.parameters(), lr=1.0)
        for step in range(2):
            loss(model, data(step)).backward()
            optimizer.step()
        return selection.delta()

    def output(delta: SparseDelta) -> torch.Tensor:
        model = quantised("nf4")
        delta.apply(model)
        return model(data(9))

    first, second, model = made(1), made(2), quantised("nf4")
    before = payload(model)
    displaced = first.apply(model)
    displaced = unmask.swap(model, displaced, second)
    assert torch.equal(model(data(9)), output(second))
    unmask.swap(model, displaced, first)
    assert torch.equal(model(data(9)), output(first))
    assert payload(model).keys() == before.keys()


# Refusals.


def assert_nothing_changes(
    model: nn.Module, match: str | None, *args: SparseDelta, error: type[BaseException] = DeltaError
) -> None:
    before, versions = snapshot(model), [p._version for p in model.parameters()]
    with pytest.raises(error, match=match):
        unmask.swap(model, *args)
    assert_same_tensors(snapshot(model), before)
    assert [p._version for p in model.parameters()] == versions


def test_a_wrong_delta_or_a_wrong_displaced_one_changes_nothing():
    first, second = tuned(unmask.random_mask(60, seed=1)), tuned(unmask.random_mask(60, seed=2))
    base = travelling()
    displaced = first.apply(base)
    assert_nothing_changes(base, "give unmask.swap what apply returned", first, second)  # not what apply returned
    assert_nothing_changes(base, "not the delta's base", second, first)
    displaced_second = second.apply(travelling())
    assert_nothing_changes(base, "not the delta's base", displaced_second, second)
    name, entry = next(iter(second.sparse.items()))
    of_another_base = SparseDelta({name: entry}, {}, "", places=fingerprint_at({name: entry.holding(entry.values + 1)}))
    assert_nothing_changes(base, "not the delta's base", displaced, of_another_base)
    too_large = SparseDelta({"scale": SparseTensor(torch.tensor([1]), torch.ones(1), (2,))}, {}, "sha256:0")
    assert_nothing_changes(base, "has shape", displaced, too_large)
    assert_same_tensors(snapshot(base), after(first))
    unmask.select(base, unmask.id3(3, steps=1))
    assert_nothing_changes(base, r"release\(\)", displaced, second)


def test_a_delta_without_a_hash_of_places_is_checked_in_full_when_the_other_one_is_off():
    first, second = tuned(unmask.random_mask(60, seed=1)), tuned(unmask.random_mask(60, seed=2))
    old = SparseDelta(second.sparse, second.whole, second.base, second.metadata)
    base = travelling()
    displaced = first.apply(base)
    base.body[0].weight.data.view(-1)[_free(first, second)] += 1
    assert_nothing_changes(base, "its fingerprint is", displaced, old)
    base.body[0].weight.data.view(-1)[_free(first, second)] -= 1
    unmask.swap(base, displaced, old)
    assert_same_tensors(snapshot(base), after(second))


def _free(*deltas: SparseDelta) -> int:
    """Returns a place of a tensor that no delta sets; its value can be changed and put back exactly."""
    taken = {int(i) for delta in deltas for i in delta.sparse["body.0.weight"].indices}
    values = travelling().body[0].weight.detach().view(-1)
    return next(i for i in range(36) if i not in taken and float(values[i] + 1 - 1) == float(values[i]))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", ["other places", "the same places"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_failure_at_any_write_changes_nothing(error, case, threads, monkeypatch):
    """Lets the n-th write of single weights fail, after it has written, for every n."""
    one, two, _ = METHODS[case]
    first, second = tuned(one, dense="head"), tuned(two, lr=0.2, dense="head")
    base, put = travelling(), exchange_module.put
    displaced, failing, calls = first.apply(base), 0, 0

    def counting(*args):
        nonlocal calls
        calls += 1
        put(*args)
        if calls == failing:
            raise error

    monkeypatch.setattr(exchange_module, "_RUN", 4)  # several runs for each tensor
    monkeypatch.setattr(exchange_module, "_FEW", 1)
    monkeypatch.setattr(exchange_module, "put", counting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    unmask.swap(copy.deepcopy(base), displaced, second)
    writes, kind = calls, KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DeltaError
    assert writes >= (15 if case == "the same places" else 25)  # 60 weights, or 60 and 40, in runs of four
    for number in range(1, writes + 1):
        calls, failing = 0, number
        assert_nothing_changes(
            base,
            None if kind is KeyboardInterrupt else "could not be written: out of memory",
            displaced,
            second,
            error=kind,
        )
    calls = failing = 0
    unmask.swap(base, displaced, second)
    assert_same_tensors(snapshot(base), after(second))


def test_a_tensor_that_refuses_for_good_leaves_the_others_as_they_were(monkeypatch):
    first, second = tuned(unmask.random_mask(60, seed=1)), tuned(unmask.random_mask(60, seed=2))
    base, put = travelling(), exchange_module.put
    displaced, stuck = first.apply(base), base.turned.data_ptr()

    def refuses(tensor, *args):
        if tensor.data_ptr() == stuck:
            raise RuntimeError("a driver's error")
        put(tensor, *args)

    monkeypatch.setattr(exchange_module, "put", refuses)
    assert_nothing_changes(base, "'turned' could not be written: a driver's error", displaced, second)


# What a swap costs.


def test_tensors_with_the_same_places_are_written_once(monkeypatch):
    """Two deltas agree in their places in some tensors only; the others are written twice."""
    (one, two), other = (tuned(unmask.pafi(60), lr=lr) for lr in (0.1, 0.2)), tuned(unmask.random_mask(60))
    name = next(name for name in two.sparse if name in other.sparse)
    mixed = SparseDelta({**two.sparse, name: other.sparse[name]}, two.whole, two.base)
    held = {
        n: e.holding(base_tensors(travelling())[n].contiguous().view(-1)[e.indices]) for n, e in mixed.sparse.items()
    }
    mixed = SparseDelta(mixed.sparse, mixed.whole, mixed.base, places=fingerprint_at(held))
    base, put, calls = travelling(), exchange_module.put, []
    displaced = one.apply(base)
    monkeypatch.setattr(exchange_module, "put", lambda *args: (calls.append(args), put(*args)))
    displaced = unmask.swap(base, displaced, mixed)
    assert len(calls) == len(one.sparse) + 1
    assert_same_tensors(snapshot(base), after(mixed))
    wrong = SparseDelta(two.sparse, two.whole, two.base, places="sha256:0")
    assert_nothing_changes(base, "not the delta's base", displaced, wrong)
    unmask.swap(base, displaced, two).apply(base)
    assert_same_tensors(snapshot(base), snapshot(travelling()))


def test_places_are_hashed_and_moved_once_for_many_swaps(monkeypatch):
    first, second = tuned(unmask.random_mask(60, seed=1)), tuned(unmask.random_mask(60, seed=2))
    base = travelling()
    displaced = unmask.swap(base, first.apply(base), second)
    displaced = unmask.swap(base, displaced, first)
    known = {id(e): dict(e._known) for e in first.sparse.values()}
    for delta in (second, first):
        displaced = unmask.swap(base, displaced, delta)
        assert all(displaced.sparse[name]._known is entry._known for name, entry in delta.sparse.items())
    for entry in first.sparse.values():
        assert entry._known.keys() == known[id(entry)].keys()
        assert all(entry._known[key] is value for key, value in known[id(entry)].items())


@pytest.mark.parametrize("threads", [1, 2])
def test_large_deltas_are_written_by_several_threads(threads):
    """Two tensors of some runs each, written by torch's number of threads, against plain indexing."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 500, bias=False), nn.Linear(500, 600, bias=False)).to(torch.bfloat16)
    before, tensors = snapshot(model), base_tensors(model)

    def drawn() -> SparseDelta:
        sparse, held = {}, {}
        for name, tensor in tensors.items():
            flat = torch.randperm(tensor.numel(), generator=generator)[:150_000].sort().values
            sparse[name] = SparseTensor(flat, torch.randn(150_000, generator=generator).bfloat16(), tuple(tensor.shape))
            held[name] = sparse[name].holding(before[name].view(-1)[flat])
        return SparseDelta(sparse, {}, "", places=fingerprint_at(held))

    first, second, usual = drawn(), drawn(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        displaced = unmask.swap(model, first.apply(model), second)
    finally:
        torch.set_num_threads(usual)
    for name, entry in second.sparse.items():
        expected = before[name].clone()
        expected.view(-1)[entry.indices] = entry.values
        assert torch.equal(tensors[name], expected)
        assert torch.equal(displaced.sparse[name].values, before[name].view(-1)[entry.indices])


def test_values_reach_a_device_and_come_back_in_one_copy(monkeypatch):
    """Treats the CPU as a device next to it: the values of all tensors of a dtype are one copy."""
    groups = []

    def one_group(parts):
        found: dict[torch.dtype, list] = {}
        for part in parts:
            found.setdefault(part.old.dtype, []).append(part)
        groups.append(len(found))
        return list(found.values())

    first, second = tuned(unmask.random_mask(60, seed=1)), tuned(unmask.random_mask(60, seed=2))
    monkeypatch.setattr(exchange_module, "_elsewhere", one_group)
    base = travelling()
    displaced = unmask.swap(base, first.apply(base), second)
    assert_same_tensors(snapshot(base), after(second))
    displaced.apply(base)
    assert_same_tensors(snapshot(base), snapshot(travelling()))
    assert set(groups) == {1}
