"""Tests the analyses on cases worked by hand, on identities, and on real selections, deltas and checkpoints."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import as_lists, batches, id3_run, mlp, snapshot, train, trained
from safetensors.torch import save_file

import unmask
from unmask import DeltaError, MethodError, SelectionError, SparseDelta
from unmask.analysis import (
    allocation,
    changed,
    densities,
    drift,
    gradient_updates,
    mask_of,
    mask_over,
    overlap,
    rank_correlation,
    snapshots,
    sparsity_entropy,
    tensor_sparsity,
    turnover,
)
from unmask.analysis import snapshot as allocation_snapshot

HAND = mask_over({"a": torch.tensor([0, 3]), "b": torch.tensor([5])}, {"a": (2, 2), "b": (6,), "c": (10,)})


def random_mask(seed: int, counts: dict[str, int], sizes: dict[str, int]):
    draw = torch.Generator().manual_seed(seed)
    flat = {n: torch.randperm(sizes[n], generator=draw)[:k].sort().values for n, k in counts.items()}
    return mask_over(flat, {name: (size,) for name, size in sizes.items()})


# ---------------------------------------------------------------- measures of masks


def test_measures_of_a_mask_worked_by_hand():
    assert len(HAND) == 3
    assert tensor_sparsity(HAND) == pytest.approx(1 / 3)
    assert densities(HAND) == {"a": 0.5, "b": pytest.approx(1 / 6), "c": 0.0}
    # The densities 1/2 and 1/6 are divided by their sum: 3/4 and 1/4. The shares are 2/3 and 1/3.
    assert sparsity_entropy(HAND) == pytest.approx(2 * math.log(2) - 0.75 * math.log(3))
    assert sparsity_entropy(HAND, of="share") == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    shot = allocation_snapshot(HAND)
    assert (shot["sparsity_entropy"], shot["sparsity_entropy_share"]) == (
        sparsity_entropy(HAND, of="density"),
        sparsity_entropy(HAND, of="share"),
    )
    with pytest.raises(MethodError, match="must be 'density' or 'share'"):
        sparsity_entropy(HAND, of="count")
    assert allocation(HAND) == [{"layer": "other", "kind": "other", "unmasked": 3, "of": 20}]


def test_entropy_lies_between_one_tensor_and_an_even_spread():
    sizes = dict.fromkeys("abcde", 8)
    even = random_mask(0, dict.fromkeys("abcde", 4), sizes)
    assert sparsity_entropy(even) == pytest.approx(math.log(5))
    assert sparsity_entropy(even, of="share") == pytest.approx(math.log(5))
    assert sparsity_entropy(random_mask(0, {"c": 7}, sizes)) == 0
    assert sparsity_entropy(mask_over({}, {"a": (3,)})) == 0
    assert 0 < sparsity_entropy(random_mask(0, {"a": 1, "b": 7}, sizes)) < math.log(2)


def test_tensors_of_all_sizes_count_alike_in_the_entropy_of_densities():
    mask = random_mask(0, {"a": 2, "b": 20}, {"a": 10, "b": 100})
    assert sparsity_entropy(mask) == pytest.approx(math.log(2))
    assert sparsity_entropy(mask, of="share") == pytest.approx(math.log(11) - 10 / 11 * math.log(10))


def test_overlap_by_hand_and_its_identities():
    sizes = {"a": 10, "b": 10}
    one, two = random_mask(1, {"a": 6, "b": 2}, sizes), random_mask(2, {"a": 5}, sizes)
    both, turned = overlap(one, two), overlap(two, one)
    assert both.common == len(set(one.indices["a"].tolist()) & set(two.indices["a"].tolist()))
    assert (both.a, both.b) == (8, 5) == (turned.b, turned.a)
    assert both.jaccard == turned.jaccard == both.common / (13 - both.common)
    assert both.of_a == turned.of_b == both.common / 8
    assert both.expected == turned.expected == pytest.approx(8 * 5 / 20)
    assert both.times_chance == pytest.approx(both.common / 2)
    same = overlap(one, one)
    assert (same.jaccard, same.of_a, same.of_b) == (1, 1, 1)


def test_the_expected_overlap_is_the_average_over_random_masks():
    """The scopes agree in part: one mask is over a and b, the other over b and c."""
    found = []
    for seed in range(400):
        draw = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        again = torch.randperm(25, generator=torch.Generator().manual_seed(10_000 + seed))
        one = {"a": draw[:9][draw[:9] < 10].sort().values, "b": (draw[:9][draw[:9] >= 10] - 10).sort().values}
        two = {"b": again[:8][again[:8] < 20].sort().values, "c": (again[:8][again[:8] >= 20] - 20).sort().values}
        pair = overlap(mask_over(one, {"a": (10,), "b": (20,)}), mask_over(two, {"b": (20,), "c": (5,)}))
        found.append(pair.common)
    assert pair.expected == pytest.approx(9 * 8 * 20 / (30 * 25))
    assert sum(found) / len(found) == pytest.approx(pair.expected, abs=0.2)


def test_the_expected_overlap_is_none_where_scopes_are_not_known():
    delta = trained()[2].delta()
    assert overlap(delta, delta).expected == pytest.approx(len(delta) ** 2 / delta.metadata["eligible"]["weights"])
    assert overlap(delta, HAND).expected is None
    assert overlap(delta, HAND).times_chance is None


def test_masks_of_other_shapes_are_refused():
    with pytest.raises(DeltaError, match=r"'a' has shape \(2, 2\) in one and \(4,\)"):
        overlap(HAND, mask_over({}, {"a": (4,)}))


# ---------------------------------------------------------------- gradient updates


@pytest.mark.parametrize(("budget", "steps"), [(100, 10), (7, 7), (320_000, 1_000)])
def test_uniform_increments_make_half_the_updates_of_a_static_mask(budget, steps):
    assert gradient_updates(unmask.id3(budget, steps=steps), budget) == budget * (steps + 1) // 2
    assert gradient_updates(unmask.pafi(budget), budget, steps) == budget * steps


@pytest.mark.parametrize("method", [
    unmask.id3(12, steps=5), unmask.id3(12, steps=6, stride=4), unmask.id3(12, steps=6, schedule="front-loaded"),
    unmask.static_d3(12), unmask.repeat_d3(12), unmask.repeat_d3(12, stride=3, leaving="kept"), unmask.pafi(12),
])  # fmt: skip
def test_updates_equal_those_counted_in_a_run_that_goes_on_after_the_schedule(method):
    model = mlp()
    selection = unmask.select(model, method)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.01)
    counted = 0
    for x in batches(8):
        model(x).square().mean().backward()
        optimizer.step()
        counted += sum(len(flat) for flat in selection.picked.values())  # the weights that this step has trained
        optimizer.zero_grad()
    assert gradient_updates(method, 12, steps=8) == counted


def test_updates_that_cannot_be_counted_are_refused():
    with pytest.raises(MethodError, match="give steps="):
        gradient_updates(unmask.pafi(5), 5)
    with pytest.raises(MethodError, match="whole tensors"):
        gradient_updates(unmask.full(), 5, 5)
    with pytest.raises(MethodError, match="steps = -1"):
        gradient_updates(unmask.pafi(5), 5, -1)


# ---------------------------------------------------------------- drift


def test_rank_correlation_is_pearsons_of_the_mean_ranks():
    draw = torch.Generator().manual_seed(3)
    a, b = (torch.randint(0, 9, (400,), generator=draw).float() for _ in range(2))
    b = b + 0.4 * a
    below = [(x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2 for x in (a, b)]  # the mean rank of ties
    assert rank_correlation(a, b) == pytest.approx(torch.corrcoef(torch.stack(below).double())[0, 1].item(), abs=1e-12)
    assert rank_correlation(a.bfloat16(), a) == pytest.approx(1)
    assert rank_correlation(a, a) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert math.isnan(rank_correlation(a, torch.ones(400)))


def test_drift_by_hand():
    first = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 3.0])}
    second = {"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([1.0, 4.0])}  # of the two 4s, that of a comes first
    third = {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([9.0, 8.0])}
    near, far = drift([first, second, third], k=2)
    assert (near.earlier, near.later, near.top_overlap, near.expected) == (0, 1, 0.5, 0.5)
    assert near.rank_correlation == pytest.approx(
        rank_correlation(torch.tensor([5.0, 1, 4, 3]), torch.tensor([5.0, 4, 1, 4]))
    )
    assert far.top_overlap == 0
    assert [d.earlier for d in drift([first, second, third], k=2, against="first")] == [0, 0]
    assert drift([first, first], k=3)[0].top_overlap == 1
    for k in (0, 5):
        with pytest.raises(MethodError, match=f"k = {k}"):
            drift([first, second], k=k)
    with pytest.raises(MethodError, match="snapshot 1 holds other tensors"):
        drift([first, {"a": first["a"]}], k=1)
    with pytest.raises(MethodError, match="NaN"):
        drift([first, {"a": first["a"], "b": first["b"] * math.nan}], k=1)


@pytest.mark.parametrize(("method", "stays"), [(unmask.id3(12, steps=4), True), (unmask.repeat_d3(12), False)])
def test_only_repeat_s_has_a_turnover(method, stays):
    model = mlp()
    selection = unmask.select(model, method)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05)
    masks = []
    for x in batches(4):
        train(model, optimizer, [x])
        masks.append(mask_of(selection))
    assert (max(turnover(masks)) == 0) is stays


# ---------------------------------------------------------------- selections, deltas, checkpoints


def test_a_selection_its_delta_and_two_checkpoints_agree(tmp_path):
    base, tuned, selection = trained(method=unmask.id3(30, steps=3))
    delta = SparseDelta.load(selection.delta().save(tmp_path / "d.safetensors"))
    before, after = snapshot(base), snapshot(tuned)
    live = mask_of(selection)
    assert as_lists(live.indices) == as_lists(selection.indices) == as_lists(mask_of(delta).indices)
    assert (tensor_sparsity(delta), sparsity_entropy(delta)) == (
        tensor_sparsity(selection),
        sparsity_entropy(selection),
    )
    assert allocation(mask_of(delta).like(base)) == allocation(live)
    between = changed(before, after)
    trained_values = {n: flat for n, flat in between.indices.items() if n in live.indices}
    assert overlap(mask_over(trained_values, between.shapes), live).jaccard == 1
    selection.release()
    assert as_lists(mask_of(selection).indices) == as_lists(live.indices)


def test_prefixes_of_the_slots_are_the_masks_of_earlier_steps(tmp_path):
    model = mlp()
    selection, optimizer = id3_run(model, budget=22, steps=4)
    seen = {}
    for x in batches(4):
        train(model, optimizer, [x])
        seen[selection.used] = as_lists(selection.indices)
    delta = SparseDelta.load(selection.delta(order=True).save(tmp_path / "d.safetensors"))
    for used, expected in seen.items():
        assert as_lists(mask_of(selection, used).indices) == as_lists(mask_of(delta, used).indices) == expected
    assert [shot["used"] for shot in snapshots(delta, 4)] == [6, 11, 17, 22]
    assert snapshots(delta, 4)[-1]["tensor_sparsity"] == tensor_sparsity(selection)
    assert len(mask_of(selection, 0)) == 0


def test_a_smaller_mask_is_refused_where_no_order_of_unmasking_is_known():
    model = mlp()
    selection = unmask.select(model, unmask.repeat_d3(5))
    with pytest.raises(SelectionError, match="picks again"):
        mask_of(selection, used=2)
    with pytest.raises(SelectionError, match="no order of unmasking"):
        selection.delta(order=True)
    selection.release()
    delta = unmask.select(model, unmask.pafi(5)).delta()
    with pytest.raises(DeltaError, match=r"delta\(order=True\)"):
        mask_of(delta, used=2)
    with pytest.raises(MethodError, match="used = 4; 3 weights"):
        mask_of(unmask.select(mlp(), unmask.pafi(3)), used=4)
    with pytest.raises(MethodError, match="a mask does not know"):
        mask_of(HAND, used=1)


def test_a_delta_that_lacks_its_scope_or_has_whole_tensors_only_is_refused():
    base, _, selection = trained()
    delta = selection.delta()
    old = SparseDelta(delta.sparse, delta.whole, delta.base, {})
    with pytest.raises(DeltaError, match="like"):
        tensor_sparsity(old)
    assert tensor_sparsity(mask_of(old).like(base)) > 0
    with pytest.raises(DeltaError, match="has shape"):
        HAND.like(base)
    whole = unmask.select(mlp(), unmask.full()).delta()
    with pytest.raises(DeltaError, match="whole tensors only"):
        mask_of(whole)


def test_full_fine_tuning_unmasks_everything():
    selection = unmask.select(mlp(), unmask.full())
    assert tensor_sparsity(selection) == 0
    assert set(densities(selection).values()) == {1.0}


# ---------------------------------------------------------------- checkpoints on disk


def bits(dtype):
    tuned = torch.zeros(2, 3, dtype=dtype)
    tuned[0, 1], tuned[1, 2] = -0.0, 2.0
    return {"layer.weight": torch.zeros(2, 3, dtype=dtype), "ids": torch.arange(3)}, {
        "m.layer.weight": tuned,
        "head": tuned,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_checkpoints_are_compared_bit_for_bit_through_a_prefix(dtype, tmp_path):
    base, tuned = bits(dtype)
    (tmp_path / "base").mkdir()
    (tmp_path / "tuned").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    save_file({"m.layer.weight": tuned["m.layer.weight"]}, tmp_path / "tuned" / "a.safetensors")
    save_file({"head": tuned["head"]}, tmp_path / "tuned" / "b.safetensors")
    index = {"weight_map": {"m.layer.weight": "a.safetensors", "head": "b.safetensors"}}
    (tmp_path / "tuned" / "model.safetensors.index.json").write_text(json.dumps(index))
    for one, two in (
        (base, tuned),
        (tmp_path / "base", tmp_path / "tuned"),
        (tmp_path / "base" / "model.safetensors", tuned),
    ):
        found = changed(one, two)
        assert as_lists(found.indices) == {"m.layer.weight": [1, 5]}
        assert (found.tensors, found.weights) == (1, 6)
    assert as_lists(changed(tuned, base).indices) == {"layer.weight": [1, 5]}
    assert len(changed(base, base)) == 0


def test_checkpoints_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(DeltaError, match="share no tensor name"):
        changed({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    with pytest.raises(DeltaError, match=r"torch\.bfloat16"):
        changed({"a": torch.zeros(1)}, {"a": torch.zeros(1, dtype=torch.bfloat16)})
    with pytest.raises(DeltaError, match="no checkpoint at"):
        changed(tmp_path / "nowhere", {})
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DeltaError, match="truncated or damaged"):
        changed(tmp_path, {})


# ---------------------------------------------------------------- the order in the file


def test_the_order_survives_the_file_and_costs_four_bytes_a_weight(tmp_path):
    base, tuned, selection = trained(torch.bfloat16, unmask.id3(60, steps=3), dense="head")
    plain, ordered = selection.delta(), selection.delta(order=True)
    sizes = [delta.save(tmp_path / f"{i}.safetensors").stat().st_size for i, delta in enumerate((plain, ordered))]
    assert 4 * len(plain) <= sizes[1] - sizes[0] < 4 * len(plain) + 150 * len(plain.sparse)
    again = SparseDelta.load(tmp_path / "1.safetensors")
    for name, entry in ordered.sparse.items():
        assert torch.equal(entry.slots, again.sparse[name].slots)
        assert torch.equal(selection.ledger.positions[entry.slots], entry.indices + selection.ledger.layout.starts[
            selection.ledger.layout.names.index(name)])  # fmt: skip
    again.apply(base)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(base).values(), snapshot(tuned).values(), strict=True))


def test_a_damaged_order_is_refused():
    sound = {
        n: unmask.SparseTensor(torch.arange(2), torch.zeros(2), (4,), torch.tensor(s))
        for n, s in (("a", [0, 3]), ("b", [1, 2]))
    }
    SparseDelta(sound, {}, "sha256:0")
    for slots in (torch.tensor([1, 1]), torch.tensor([1, 4]), torch.tensor([1, 2, 0]), None):
        broken = sound | {"b": unmask.SparseTensor(torch.arange(2), torch.zeros(2), (4,), slots)}
        with pytest.raises(DeltaError, match="order of unmasking"):
            SparseDelta(broken, {}, "sha256:0")
