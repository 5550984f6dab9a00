"""Adds, subtracts and combines deltas, by hand and against plain dense arithmetic."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from helpers import batches, mlp, train
from torch import nn

import unmask
from unmask import DeltaError, SparseDelta, SparseTensor
from unmask.delta.base import base_tensors
from unmask.methods.draw import uniform

BASE = [1.0, 2.0, 3.0, 4.0]


class Four(nn.Module):
    """Holds four weights, by default 1 to 4."""

    def __init__(self, values=BASE, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=dtype))


def fingerprint_of(model, whole=()):
    from unmask.delta.fingerprint import digest, fingerprint

    return fingerprint({n: digest(t) for n, t in base_tensors(model).items() if n not in whole})


def delta(entries, *, whole=None, note="", dtype=torch.float32):
    """Makes a delta of `Four` from {index: value}."""
    at = sorted(entries)
    entry = SparseTensor(torch.tensor(at, dtype=torch.int64), torch.tensor([entries[i] for i in at], dtype=dtype), (4,))
    whole = whole or {}
    return SparseDelta({"w": entry}, whole, fingerprint_of(Four(dtype=dtype), whole), {"note": note, "base_id": "four"})


def entries(combined):
    held = combined.sparse.get("w")
    return {} if held is None else dict(zip(held.indices.tolist(), held.values.tolist(), strict=True))


A, B = delta({0: 2.0, 1: 0.0}, note="a"), delta({1: 5.0, 2: 3.5}, note="b")  # changes +1, -2 and +3, +0.5


def test_disjoint_deltas_add_in_any_order_and_come_apart_again(tmp_path):
    parts = [delta({0: 2.0}, note="a"), delta({3: -0.0}, note="b"), delta({1: 7.0, 2: 8.0}, note="c")]
    sums = [x | y | z for x, y, z in itertools.permutations(parts)] + [parts[0] | (parts[1] | parts[2])]
    for each in sums:
        assert each == sums[0]
        assert entries(each) == {0: 2.0, 1: 7.0, 2: 8.0, 3: -0.0}
        assert torch.signbit(each.sparse["w"].values[3])
        assert each.base == parts[0].base
        assert each.metadata["base_id"] == "four"
        assert each.metadata["used"] == 4
        assert {part["metadata"]["note"] for part in each.metadata["combined"]["parts"]} == {"a", "b", "c"}
    model = Four()
    displaced = sums[0].apply(model)
    assert model.w.tolist() == [2.0, 7.0, 8.0, 0.0]
    displaced.apply(model)
    assert model.w.tolist() == BASE
    loaded = SparseDelta.load(sums[0].save(tmp_path / "sum.safetensors"))
    assert loaded == sums[0]
    assert loaded.provenance.combined["rule"] is None
    for total in (sums[0], loaded):
        for one, two, three in itertools.permutations(parts):
            assert total - one == two | three
            assert total - one - two == three
            assert total - (one | two) == three


def test_sums_of_trained_deltas_are_the_models_of_both():
    """Each of three runs leaves alone what the others have; every metadata entry of a part comes back."""
    deltas, trained = [], []
    for seed in range(3):
        torch.manual_seed(0)
        model = mlp()
        selection = unmask.select(model, unmask.random_mask(40, seed=seed), avoid=deltas)
        train(model, torch.optim.SGD(selection.parameters(), lr=0.5), batches(3))
        deltas.append(selection.delta(order=True))
        trained.append({n: p.detach().clone() for n, p in model.named_parameters()})
    torch.manual_seed(0)
    merged, base = mlp(), mlp()
    base.load_state_dict(merged.state_dict())
    total = deltas[2] | deltas[0] | deltas[1]
    total.apply(merged)
    for name, p in merged.named_parameters():
        expected = base.get_parameter(name).detach().clone()
        for state in trained:
            changed = state[name] != base.get_parameter(name)
            expected[changed] = state[name][changed]
        assert p.equal(expected)
    rest = total - deltas[1]
    again = rest - deltas[2]
    plain = {n: SparseTensor(e.indices, e.values, e.shape) for n, e in deltas[0].sparse.items()}
    assert again == SparseDelta(plain, deltas[0].whole, deltas[0].base, deltas[0].metadata, deltas[0].places)
    assert again.provenance.method["parameters"] == {"seed": 0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rule": "last"}, {0: 2.0, 1: 5.0, 2: 3.5}),
        ({"rule": "mean"}, {0: 2.0, 1: 2.5, 2: 3.5}),
        ({"rule": "linear"}, {0: 2.0, 1: 3.0, 2: 3.5}),
        ({"rule": "linear", "weights": [1, 2]}, {0: 2.0, 1: 6.0, 2: 4.0}),
        ({"rule": "linear", "weights": [-1, 0]}, {0: 0.0, 1: 4.0, 2: 3.0}),
        ({"rule": "magnitude_prune", "density": 0.5}, {1: 3.0}),
        ({"rule": "magnitude_prune", "density": 0.6}, {0: 2.0, 1: 3.0, 2: 3.5}),
        ({"rule": "ties", "density": 1}, {0: 2.0, 1: 5.0, 2: 3.5}),
        ({"rule": "ties", "density": 1, "majority": "frequency"}, {0: 2.0, 1: 5.0, 2: 3.5}),
        ({"rule": "ties", "density": 0.5}, {1: 5.0}),
        ({"rule": "ties", "density": 1, "weights": [2, 3]}, {0: 3.0, 1: 11.0, 2: 4.5}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rules_by_hand(options, expected, dtype):
    needs = options["rule"] not in ("last", "mean")
    a, b = (delta(entries(each), dtype=dtype) for each in (A, B))
    combined = unmask.combine(a, b, **options, base=Four(dtype=dtype) if needs else None)
    assert entries(combined) == expected
    assert combined.sparse["w"].values.dtype == dtype
    assert combined.base == a.base


@pytest.mark.parametrize(("majority", "expected"), [("total", 0.0 - 4), ("frequency", 0.0 + 1.5)])
def test_ties_elects_a_sign_among_three(majority, expected):
    """The changes of one weight are -4, +1 and +2; the sum is -1, and two of three are positive."""
    deltas = [delta({0: 1.0 + change}) for change in (-4.0, 1.0, 2.0)]
    combined = unmask.combine(*deltas, rule="ties", density=1, majority=majority, base=Four())
    assert entries(combined) == {0: 1.0 + expected}


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare_drops_at_random_and_rescales(rule):
    base = torch.zeros(1000)
    model = Four(base.tolist())
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(2, 1000, generator=generator)
    deltas = [
        SparseDelta({"w": SparseTensor(torch.arange(1000), row, (1000,))}, {}, fingerprint_of(model)) for row in changes
    ]
    keep = torch.stack([torch.from_numpy(uniform(1000, 0, 7, k)) < 0.25 for k in range(2)])
    assert 200 < int(keep[0].sum()) < 300
    scaled = changes.double() * keep * 4
    if rule == "dare_ties":
        sign = torch.where(scaled.sum(0) >= 0, 1, -1)
        agree = scaled.sign() == sign
        expected = (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)
    else:
        expected = scaled.sum(0)
    combined = unmask.combine(*deltas, rule=rule, density=0.25, seed=7, base=model)
    assert combined.sparse["w"].indices.equal(keep.any(0).nonzero().squeeze(1))
    torch.testing.assert_close(combined.sparse["w"].values, expected.float()[keep.any(0)])
    other = unmask.combine(*deltas, rule=rule, density=0.25, seed=8, base=model)
    assert other.sparse["w"].indices.tolist() != combined.sparse["w"].indices.tolist()


@pytest.mark.parametrize("rule", ["last", "mean", "linear", "ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_under_every_rule_disjoint_deltas_keep_their_values(rule):
    """The base and the values differ so much that the change, added to the base again, is not the value."""
    model = Four([1e20, 3.0, 1e-20, 4.0])
    one = SparseDelta({"w": SparseTensor(torch.tensor([0]), torch.tensor([1e-20]), (4,))}, {}, fingerprint_of(model))
    two = SparseDelta({"w": SparseTensor(torch.tensor([2]), torch.tensor([1e20]), (4,))}, {}, fingerprint_of(model))
    needs = rule not in ("last", "mean")
    density = {"density": 1.0} if needs and rule != "linear" else {}
    combined = unmask.combine(one, two, rule=rule, base=model if needs else None, **density)
    assert combined.sparse["w"].values.equal((one | two).sparse["w"].values)


def test_an_overlap_without_a_rule_is_refused():
    with pytest.raises(DeltaError, match="overlap in 1 weights, the first of them in 'w'"):
        A | B
    with pytest.raises(DeltaError, match="rule='mean'"):
        unmask.combine(A, B)


HEAD_A, HEAD_B = {"head": torch.zeros(2)}, {"head": torch.ones(2)}


def test_each_task_has_its_own_head_on_one_body():
    a, b = delta({0: 2.0}, whole=HEAD_A).with_metadata(task="a"), delta({1: 3.0}, whole=HEAD_B).with_metadata(task="b")
    with pytest.raises(DeltaError, match="'head' is stored whole in deltas number 0 and 1"):
        a | b
    both = {task: unmask.combine(a, b, heads=task_delta) for task, task_delta in (("a", a), ("b", b))}
    for task, head in (("a", HEAD_A), ("b", HEAD_B)):
        assert entries(both[task]) == {0: 2.0, 1: 3.0}
        assert both[task].whole["head"].equal(head["head"])
        assert both[task].metadata["task"] == task
        assert both[task].base == a.base
    assert both["a"] - b == a
    with pytest.raises(DeltaError, match="'head' is stored whole in what would be left"):
        both["a"] - a
    assert unmask.combine(a, b, rule="last").whole["head"].equal(HEAD_B["head"])
    with pytest.raises(DeltaError, match="heads must be one of the deltas"):
        unmask.combine(a, b, heads=delta({0: 2.0}))


def test_equal_whole_tensors_are_one():
    a, b = delta({0: 2.0}, whole=HEAD_A), delta({1: 3.0}, whole={"head": torch.zeros(2)})
    assert (a | b).whole["head"].equal(HEAD_A["head"])
    assert (a | b) - a == b
    only = delta({2: 3.0}, whole={"other": torch.ones(1)})
    assert sorted((a | only).whole) == ["head", "other"]
    assert (a | only).base == ""  # what neither says
    assert (a | only) - a == only


def test_whole_and_in_part_do_not_go_together():
    a = delta({0: 2.0})
    b = SparseDelta({}, {"w": torch.ones(4)}, "")
    with pytest.raises(DeltaError, match="'w' is stored whole in one delta and in part in another"):
        unmask.combine(a, b, rule="last")
    inits = [
        SparseDelta({"w": SparseTensor(torch.tensor([k]), torch.ones(1), (4,))}, {"w": torch.full((4,), seed)}, "")
        for k, seed in ((0, 0.0), (1, 0.0), (2, 9.0))
    ]
    same = inits[0] | inits[1]
    assert same.overlaid == ["w"]
    assert len(same) == 2
    with pytest.raises(DeltaError, match="started at other values in each delta"):
        unmask.combine(inits[0], inits[2], heads=inits[0])


def test_the_base_of_a_tensor_that_no_base_holds_is_its_own_init():
    model = Four()
    inits = [
        SparseDelta({"w": SparseTensor(torch.tensor([0]), torch.tensor([v]), (4,))}, {"w": torch.full((4,), 10.0)}, "")
        for v in (11.0, 12.0)
    ]
    assert entries(unmask.combine(*inits, rule="linear", base=model)) == {0: 13.0}


def test_deltas_of_other_bases_are_refused():
    stranger = SparseDelta({"w": A.sparse["w"]}, {}, "sha256:other")
    with pytest.raises(DeltaError, match="delta number 1 was made on another base"):
        unmask.combine(A, stranger, rule="last")
    wide = SparseDelta({"w": SparseTensor(torch.tensor([9]), torch.ones(1), (10,))}, {}, "")
    half = SparseDelta({"w": SparseTensor(torch.tensor([3]), torch.ones(1).bfloat16(), (4,))}, {}, "")
    for other in (wide, half):
        with pytest.raises(DeltaError, match="belong to other bases"):
            A | other
    smaller = delta({3: 1.0}).with_metadata(between={"added": [], "removed": ["b"]})
    with pytest.raises(DeltaError, match="delta number 1 removes, replaces or renames tensors"):
        A | smaller
    with pytest.raises(DeltaError, match="is not the base of delta number 0"):
        unmask.combine(A, B, rule="linear", base=Four([1.0, 2.0, 3.0, 5.0]))
    with pytest.raises(DeltaError, match="has shape"):
        unmask.combine(A, B, rule="linear", base=Four([1.0] * 5))


def test_deltas_between_checkpoints_add_up_unless_they_rename():
    """The metadata of each such delta has an entry ``renamed``, which is of two empty prefixes where the names are the same."""
    base = {"w": torch.arange(8.0)}
    tuned = [{"w": base["w"].index_fill(0, torch.tensor([place]), 9.0)} for place in (1, 5)]
    one, other = (SparseDelta.between(base, each) for each in tuned)
    assert entries(one | other) == {1: 9.0, 5: 9.0}
    assert (one | other) - one == other
    renaming = SparseDelta.between(base, {"net.w": tuned[1]["w"]})
    with pytest.raises(DeltaError, match="delta number 1 removes, replaces or renames tensors"):
        one | renaming


def test_an_unknown_base_is_found_out_from_the_model():
    a = delta({0: 2.0}, whole={"head": torch.zeros(2)})
    model = Four()
    model.head = nn.Parameter(torch.ones(2))
    model.other = nn.Parameter(torch.ones(1))
    a = SparseDelta(a.sparse, a.whole, fingerprint_of(model, {"head"}))
    b = SparseDelta({}, {"other": torch.zeros(1)}, fingerprint_of(model, {"other"}))
    combined = unmask.combine(a, b, base=model)
    assert combined.base == fingerprint_of(model, {"head", "other"})
    c = SparseDelta({"w": SparseTensor(torch.tensor([3]), torch.tensor([4.0]), (4,))}, {}, fingerprint_of(model))
    assert (combined | c).base == (c | combined).base == combined.base
    assert (combined | c) - c - b == a
    combined.apply(model)
    assert [model.w.tolist(), model.head.tolist(), model.other.tolist()] == [[2.0, 2.0, 3.0, 4.0], [0.0, 0.0], [0.0]]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rule": "average"}, "rule = 'average'; it must be None or one of last, mean"),
        ({"rule": "linear"}, "give base=model"),
        ({"rule": "ties"}, "density = None; rule 'ties' needs the share"),
        ({"rule": "ties", "density": 0}, "density = 0"),
        ({"rule": "ties", "density": 1.5}, r"density = 1\.5"),
        ({"rule": "ties", "density": True}, "density = True"),
        ({"rule": "mean", "density": 0.5}, r"density = 0\.5 goes with"),
        ({"rule": "mean", "weights": [1, 1]}, "weights = "),
        ({"rule": "linear", "weights": [1], "base": Four()}, "one finite number for each of the 2 deltas"),
        ({"rule": "linear", "weights": [1, float("nan")], "base": Four()}, "one finite number"),
        ({"rule": "linear", "weights": [1, "2"], "base": Four()}, "one finite number"),
        ({"rule": "dare_ties", "density": 0.5, "seed": 0.5}, r"seed = 0\.5"),
        ({"rule": "ties", "density": 1, "majority": "most"}, "majority = 'most'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, error):
    with pytest.raises(DeltaError, match=error):
        unmask.combine(A, B, **options)


def test_no_delta_and_other_things_are_refused():
    with pytest.raises(DeltaError, match="got no delta"):
        unmask.combine()
    with pytest.raises(DeltaError, match="got a list"):
        unmask.combine([A, B])
    with pytest.raises(TypeError):
        A | {}
    assert A != "a"
    assert delta({0: 2.0, 1: 0.0}, note="a") == A
    assert hash(A) == hash(delta({0: 2.0, 1: 0.0}, note="a"))
    assert delta({0: 0.0}) != delta({0: -0.0})


def test_only_a_part_can_be_taken_away():
    a, b, c = delta({0: 2.0}, note="a"), delta({1: 3.0}, note="b"), delta({2: 3.0}, note="c")
    for total, part in ((a | b, c), (a, b), (unmask.combine(A, B, rule="last"), A)):
        with pytest.raises(DeltaError, match="is no part of the other"):
            total - part
    with pytest.raises(DeltaError, match="nothing would be left"):
        (a | b) - (b | a)
    other = SparseDelta({"w": SparseTensor(torch.tensor([0]), torch.tensor([9.0]), (4,))}, {}, a.base, a.metadata)
    with pytest.raises(DeltaError, match="holds other values of 'w'"):
        (a | b) - other


def test_a_mixed_sum_is_one_part_of_the_next():
    mixed = unmask.combine(A, B, rule="mean")
    total = mixed | delta({3: 9.0}, note="c")
    assert len(total.metadata["combined"]["parts"]) == 2
    assert total - delta({3: 9.0}, note="c") == mixed
    assert json.dumps(total.metadata)
