"""Checks that a ladder gives back the deltas of a run bit for bit, and in how many bytes."""

from __future__ import annotations

import zlib

import nets
import pytest
import torch
from helpers import assert_same_tensors, batches, snapshot, train, travelling

import unmask
from unmask import DeltaError, Ladder, SparseDelta, SparseTensor
from unmask.delta import changes

STEPS = 10
METHODS = {
    "id3": unmask.id3(200, steps=STEPS),
    "static_d3": unmask.static_d3(200),
    "random_mask": unmask.random_mask(200),
    "repeat_d3": unmask.repeat_d3(200),
}


def run(method, dtype=torch.float32, order=False):
    """Returns the deltas of a run after every second step, and the models at these steps."""
    model, rungs, models = nets.mixed(dtype), [], []
    selection = unmask.select(model, method, dense="norm")
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    for step in range(STEPS):
        nets.loss(model, nets.tokens(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            rungs.append(selection.delta("base", order=order))
            models.append(snapshot(model))
    return rungs, models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_each_rung_is_the_model_of_its_step(name, dtype, tmp_path):
    rungs, models = run(METHODS[name], dtype)
    ladder = Ladder.load(Ladder(rungs).save(tmp_path / "ladder.safetensors"))
    assert list(ladder.rungs) == rungs
    if name == "id3":
        assert ladder.budgets == [40, 80, 120, 160, 200]
        for budget, rung in zip(ladder.budgets, rungs, strict=True):
            assert ladder.at(budget) == rung
    for rung, expected in zip(ladder.rungs, models, strict=True):
        model = nets.mixed(dtype)
        rung.apply(model)
        assert_same_tensors(snapshot(model), expected)


def test_the_order_of_unmasking_is_kept(tmp_path):
    rungs, _ = run(METHODS["id3"], order=True)
    ladder = Ladder.load(Ladder(rungs).save(tmp_path / "ladder.safetensors"))
    assert list(ladder.rungs) == rungs
    assert ladder.at(200).sparse["up.weight"].slots is not None


def test_weights_that_come_and_go_by_hand(tmp_path):
    def tuned(entries, whole=None):
        at = torch.tensor(sorted(entries))
        values = torch.tensor([entries[i] for i in at.tolist()])
        return SparseDelta({"w": SparseTensor(at, values, (2, 5))}, whole or {}, "sha256:0", {"n": len(entries)})

    odd = {"a": torch.tensor([float("nan"), -0.0]), "n": torch.tensor([3]), "c": torch.tensor([1j])}
    rungs = [
        tuned({0: 1.0}),
        tuned({0: 1.0, 9: -0.0}, odd),
        tuned({3: 5.0, 4: 1e-45}, odd | {"n": torch.tensor([-7]), "c": torch.tensor([2j])}),
        tuned({0: -1.0, 3: 5.0, 4: 3e38}, {"a": torch.zeros(3)}),
        SparseDelta(
            {
                "b": SparseTensor(torch.tensor([1]), torch.tensor([2.0]).bfloat16(), (2,)),
                **tuned({1: 0.5, 2: 0.25}).sparse,
            },
            {},
            "",
        ),
    ]
    path = Ladder(rungs).save(tmp_path / "ladder.safetensors")
    assert list(Ladder.load(path).rungs) == rungs


def test_a_change_of_values_by_hand():
    """The bits of 1.0 and of the next two floats are consecutive numbers; 0, 1 and -1 are folded to 0, 2 and 1."""
    one = torch.tensor([1.0])
    next_one = torch.nextafter(one, torch.tensor([2.0]))

    def planes(old, new):
        return list(zlib.decompress(changes._change(old, new).numpy().tobytes()))

    assert planes(one, one) == [0, 0, 0, 0]
    assert planes(one, next_one) == [2, 0, 0, 0]
    assert planes(next_one, one) == [1, 0, 0, 0]
    pair = planes(torch.cat([one, one]), torch.cat([one, next_one]))
    assert pair == [0, 2, 0, 0, 0, 0, 0, 0]


def test_unchanged_values_cost_nothing(tmp_path):
    """Rungs whose earlier weights keep their values take hardly more than the last rung."""
    torch.manual_seed(0)
    at, values = torch.randperm(1_000_000)[:20_000].sort().values, torch.randn(20_000)
    entry = torch.randperm(20_000)
    rungs = []
    for k in range(1, 6):
        own = entry[: 4_000 * k].sort().values
        rungs.append(SparseDelta({"w": SparseTensor(at[own], values[own], (1000, 1000))}, {}, "sha256:0"))
    size = Ladder(rungs).save(tmp_path / "ladder.safetensors").stat().st_size
    last = rungs[-1].save(tmp_path / "last.safetensors").stat().st_size
    assert size < 1.3 * last
    assert list(Ladder.load(tmp_path / "ladder.safetensors").rungs) == rungs


def test_what_is_no_ladder_is_refused(tmp_path):
    small, large = run(METHODS["id3"])[0][:2]
    with pytest.raises(DeltaError, match="at least one delta"):
        Ladder([])
    with pytest.raises(DeltaError, match="a rung of 40 weights comes after one of 80"):
        Ladder([large, small])
    with pytest.raises(DeltaError, match=r"budget = 41; the ladder has rungs of 40, 80 weights"):
        Ladder([small, large]).at(41)
    other = SparseDelta({name: SparseTensor(torch.arange(90), torch.ones(90), (100,)) for name in small.sparse}, {}, "")
    with pytest.raises(DeltaError, match=r"rung number 1 cannot follow .* has another shape"):
        Ladder([small, other]).save(tmp_path / "x.safetensors")
    ordered = run(METHODS["id3"], order=True)[0]
    with pytest.raises(DeltaError, match="the order of unmasking is kept in one of the two alone"):
        Ladder([small, ordered[1]]).save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(DeltaError, match="there is no ladder"):
        Ladder.load(tmp_path / "x.safetensors")
    with pytest.raises(DeltaError, match="is no readable ladder"):
        Ladder.load(small.save(tmp_path / "delta.safetensors"))
    with pytest.raises(DeltaError, match="is no readable unmask delta"):
        SparseDelta.load(Ladder([small]).save(tmp_path / "ladder.safetensors"))


def test_a_run_with_buffers(tmp_path):
    """The head is trained whole, and BatchNorm's statistics change from rung to rung."""
    model, rungs = travelling(), []
    selection = unmask.select(model, unmask.id3(60, steps=3), dense="head")
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
    for batch in batches(3):
        train(model, optimizer, [batch])
        rungs.append(selection.delta("base"))
    ladder = Ladder.load(Ladder(rungs).save(tmp_path / "ladder.safetensors"))
    assert list(ladder.rungs) == rungs
    fresh = travelling()
    ladder.rungs[-1].apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(model))
