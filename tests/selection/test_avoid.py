"""Checks that a selection leaves alone what given deltas set, for every method, and refuses what cannot be so."""

from __future__ import annotations

import functools
from collections import Counter

import distributed_runs as runs
import nets
import processes
import pytest
import torch
from helpers import batches, mlp, train
from reference import DenseReference
from scipy.stats import chisquare
from torch import nn

import unmask
from unmask import MethodError, SelectionError, SparseDelta, SparseTensor
from unmask.gradients.backend import Backend
from unmask.methods.draw import draw
from unmask.ranking import ranker as streamed
from unmask.ranking import unwaiting
from unmask.ranking.ledger import Layout
from unmask.ranking.quotas import quota
from unmask.selection.state import read_state, write_state

BUDGET, STEPS = 100, 20
ADAMW = {"lr": 3e-3, "weight_decay": 0.1}


def delta_of(model: nn.Module, method: unmask.Method, **options) -> SparseDelta:
    selection = unmask.select(model, method, **options)
    delta = selection.delta()
    selection.release()
    return delta


def flat_mask(indices, model: nn.Module):
    """Returns the mask of flat indices by tensor over all weights in name order."""
    masks = []
    for name, p in sorted(model.named_parameters()):
        mask = torch.zeros(p.numel(), dtype=torch.bool)
        mask[indices.get(name, torch.empty(0, dtype=torch.int64))] = True
        masks.append(mask)
    return torch.cat(masks)


def entries_of(*deltas: SparseDelta):
    return {
        name: torch.cat([d.sparse[name].indices for d in deltas if name in d.sparse]).unique()
        for name in {name for d in deltas for name in d.sparse}
    }


def d3(w, g):
    return g.abs() / (w.abs() + 1.0) ** 2


def uniform(t):
    return BUDGET * (t + 1) // STEPS


CASES = {
    "id3": (unmask.id3(BUDGET, STEPS), d3, uniform, {}),
    "snip": (unmask.id3(BUDGET, STEPS).but(heuristic=unmask.heuristic("snip")), lambda w, g: (w * g).abs(), uniform, {}),
    "static_d3": (unmask.static_d3(BUDGET), d3, None, {}),
    "repeat_d3": (unmask.repeat_d3(BUDGET), d3, None, {"repeat": 1}),
    "repeat_d3-kept": (unmask.repeat_d3(BUDGET, leaving="kept"), d3, None, {"repeat": 1, "kept": True}),
    "pafi": (unmask.pafi(BUDGET), lambda w, g: -w.abs(), None, {}),
}  # fmt: skip


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("name", CASES)
def test_a_method_trains_as_the_dense_reference_that_scores_avoided_weights_last(name, block, monkeypatch):
    """The delta to avoid is the method's own choice on the same batches, so it holds what the method would take."""
    monkeypatch.setattr(streamed, "BLOCK", block)
    method, score, cumulative, more = CASES[name]
    model, twin = nets.mixed(), nets.mixed()
    first = nets.mixed()
    chosen = unmask.select(first, method)
    train(first, torch.optim.AdamW(chosen.parameters(), **ADAMW), map(nets.tokens, range(STEPS)), nets.loss)
    taken = chosen.delta()
    outside = flat_mask(taken.sparse and entries_of(taken), twin)
    reference = DenseReference(
        twin,
        [n for n, _ in twin.named_parameters()],
        lambda w, g: score(w, g).masked_fill(outside, -torch.inf),
        cumulative or (lambda t: BUDGET),
        BUDGET,
        **more,
        **ADAMW,
    )
    selection = unmask.select(model, method, avoid=taken, gradients="dense")
    optimizer = torch.optim.AdamW(selection.parameters(), **ADAMW)
    for t in range(STEPS):
        value = nets.loss(model, nets.tokens(t))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert value.item() == reference.step(lambda m, t=t: nets.loss(m, nets.tokens(t)))
        assert flat_mask(selection.indices, model).equal(reference.mask)
    assert not (flat_mask(selection.indices, model) & outside).any()
    assert flat_mask(selection.indices, model).sum() >= BUDGET
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.equal(q)


@pytest.mark.parametrize("accumulation", ["candidates", "exact"])
def test_sampled_gradients_and_accumulation_leave_the_same_weights_alone(accumulation):
    model = nets.mixed()
    taken = [delta_of(model, unmask.random_mask(300, seed=s)) for s in (0, 1)]
    selections = {}
    for gradients in ("dense", "auto"):
        twin = nets.mixed()
        selection = unmask.select(
            twin, unmask.id3(BUDGET, 5), avoid=taken, gradients=gradients, accumulation=accumulation
        )
        optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
        for step in range(5):
            for batch in nets.tokens(step, 16).chunk(2):
                (nets.loss(twin, batch) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        selections[gradients] = flat_mask(selection.indices, twin)
    outside = flat_mask(entries_of(*taken), model)
    for mask in selections.values():
        assert mask.sum() == BUDGET
        assert not (mask & outside).any()
    assert selections["dense"].equal(selections["auto"])


@pytest.mark.parametrize("allocation", ["tensor", "row", "column"])
@pytest.mark.parametrize("make", [unmask.pafi, unmask.random_mask, unmask.static_d3])
def test_fair_shares_count_what_is_left_of_a_group(allocation, make):
    """With all that is left as the budget, every group gives all that it has left."""
    model = nets.mixed()
    taken = delta_of(model, unmask.pafi(700))
    outside = flat_mask(taken.sparse and entries_of(taken), model)
    left = int((~outside).sum())
    for budget in (left, left // 3):
        twin = nets.mixed()
        selection = unmask.select(twin, make(budget).but(allocation=allocation), avoid=taken)
        optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
        nets.loss(twin, torch.arange(40).view(8, 5)).backward()  # every token has a gradient
        optimizer.step()
        mask = flat_mask(selection.indices, twin)
        assert not (mask & outside).any()
        if make is not unmask.static_d3:  # a gradient of zero selects nothing
            assert mask.sum() == budget
        for index, name in enumerate(selection.ledger.layout.names):
            if allocation == "tensor":
                n = (
                    selection.ledger.layout.tensors[index].numel() - taken.sparse[name].numel
                    if name in taken.sparse
                    else 0
                )
                if n:
                    assert len(selection.indices.get(name, [])) <= -(-budget * n // left)


@pytest.mark.parametrize("allocation", ["row", "column"])
def test_a_quota_by_hand(allocation):
    """Of a matrix of 2 x 3 with 4 weights left of 4 + 6: ceil(5 * n / 10) of each group, less what it has."""
    weight = torch.zeros(2, 3)
    given = quota(allocation, weight, 5, 10, torch.tensor([1]), torch.tensor([3, 4]))
    expected = {"row": [2 - 1, 1], "column": [1, 1 - 1, 1]}[allocation]
    assert (given.rows if allocation == "row" else given.columns).tolist() == expected


def test_fish_and_bitfit():
    model = nets.mixed()
    fish = runs.METHODS["fish"]()
    first = delta_of(model, fish)
    both = unmask.select(nets.mixed(), runs.METHODS["fish"]().but(budget=120)).indices
    second = delta_of(model, fish, avoid=first)
    union = entries_of(first, second)
    assert {n: i.tolist() for n, i in union.items()} == {n: i.tolist() for n, i in both.items()}
    some = delta_of(model, unmask.bitfit(30))
    rest = delta_of(model, unmask.bitfit(), avoid=some)
    biases = {n: p.numel() for n, p in model.named_parameters() if n.endswith("bias")}
    assert {n: i.numel() for n, i in entries_of(some, rest).items()} == biases
    assert len(some) + len(rest) == sum(biases.values())
    with pytest.raises(MethodError, match="no weight is left for the budget"):
        unmask.select(model, unmask.bitfit(), avoid=[some, rest])


def test_the_random_mask_is_the_draw_among_what_is_left():
    model = nets.mixed()
    taken = delta_of(model, unmask.random_mask(500, seed=1))
    outside = flat_mask(entries_of(taken), model)
    left = [p for p in range(outside.numel()) if not outside[p]]
    selection = unmask.select(model, unmask.random_mask(200, seed=5), avoid=[taken])
    expected = [left[rank] for rank in draw(200, len(left), 5)]
    assert selection.ledger.positions.tolist() == expected


def test_every_set_of_what_is_left_is_equally_likely():
    layout = Layout(["a", "b"], [torch.zeros(4), torch.zeros(3)])
    layout.leave_out({"a": torch.tensor([0, 2]), "b": torch.tensor([1])})
    found = Counter(
        tuple(sorted(layout.numbered(torch.from_numpy(draw(2, layout.free, seed))).tolist())) for seed in range(6000)
    )
    assert set(found) == {(1, 3), (1, 4), (1, 6), (3, 4), (3, 6), (4, 6)}
    assert chisquare(list(found.values())).pvalue > 0.001


def test_the_ranking_without_waiting_leaves_them_alone_too(monkeypatch):
    model = nets.mixed()
    taken = delta_of(model, unmask.random_mask(900, seed=1))
    positions = {}
    for waits in (True, False):
        if not waits:
            monkeypatch.setattr(unwaiting, "backend_of", lambda device: Backend("portable", asks=False))
        for small in (1, 1 << 22):
            monkeypatch.setattr(unwaiting, "_SMALL", small)
            selection = unmask.select(nets.mixed(), unmask.pafi(400), avoid=taken)
            positions[waits, small] = selection.ledger.positions.tolist()
    assert len({tuple(p) for p in positions.values()}) == 1


def test_a_budget_that_exceeds_what_is_left_is_refused():
    model = mlp(depth=1)  # 42 weights
    taken = delta_of(model, unmask.random_mask(40))
    assert unmask.select(mlp(depth=1), unmask.random_mask(2), avoid=taken).budget == 2
    with pytest.raises(MethodError, match=r"only 2 are eligible .* without the 40 that the deltas to avoid set"):
        unmask.select(model, unmask.random_mask(3), avoid=taken)
    assert unmask.select(model, unmask.random_mask("50% of eligible"), avoid=taken).budget == 1


def test_a_delta_of_another_base_is_refused():
    model = mlp()
    narrow = delta_of(mlp(width=5), unmask.random_mask(5))
    other = delta_of(nets.mixed(), unmask.random_mask(5))
    whole = delta_of(nets.mixed(), unmask.full())
    with pytest.raises(MethodError, match=r"delta number 1 sets weights of '\S+' of shape .* has it with shape"):
        unmask.select(model, unmask.id3(4, 2), avoid=[delta_of(mlp(), unmask.pafi(2)), narrow])
    with pytest.raises(MethodError, match="this model lacks it"):
        unmask.select(model, unmask.id3(4, 2), avoid=other)
    with pytest.raises(MethodError, match="no tensor that this model has"):
        unmask.select(model, unmask.id3(4, 2), avoid=whole)
    for wrong in ("delta.safetensors", 3, ["delta.safetensors"]):
        with pytest.raises(MethodError, match=r"avoid .*give deltas"):
            unmask.select(model, unmask.id3(4, 2), avoid=wrong)
    assert all(p.requires_grad for p in model.parameters())


def test_tensors_that_a_delta_stores_whole_are_left_out():
    model = mlp()
    taken = delta_of(model, unmask.pafi(5), dense="^0.weight$", include=r"\d.weight")
    left = unmask.select(mlp(), unmask.random_mask(60), avoid=taken)
    assert "0.weight" not in left.ledger.layout.names
    with pytest.raises(MethodError, match="would be trained whole, and a delta to avoid sets weights of it"):
        unmask.select(model, unmask.pafi(5), dense="^0.weight$", avoid=taken)
    with pytest.raises(MethodError, match="would be trained whole"):
        unmask.select(model, unmask.full(), avoid=taken)
    with pytest.raises(MethodError, match="without the tensors that the deltas to avoid store whole"):
        unmask.select(model, unmask.pafi(5), include="^0.weight$", avoid=taken)


def test_each_task_may_train_its_own_new_head():
    model = mlp()
    head = {"dense": "^4", "new": "^4"}
    taken = delta_of(model, unmask.pafi(5), **head)
    own = delta_of(model, unmask.pafi(5), avoid=taken, **head)
    assert sorted(own.whole) == ["4.bias", "4.weight"]
    together = entries_of(own, taken)
    assert sum(flat.numel() for flat in together.values()) == 10
    scalar = SparseDelta({}, {"4.weight": torch.zeros(1, 6)}, "", {})  # another number of classes
    assert unmask.select(model, unmask.pafi(5), avoid=scalar, **head).budget == 5
    entry = {"4.weight": SparseTensor(torch.tensor([0]), torch.zeros(1), (1, 6))}  # in which it has selected
    assert unmask.select(mlp(), unmask.pafi(5), avoid=SparseDelta(entry, scalar.whole, "", {}), **head).budget == 5


def test_pruning_to_zero_cannot_leave_weights_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    method = unmask.sparse_adapter(4, criterion="magnitude")
    taken = SparseDelta({"0.bias": SparseTensor(torch.tensor([0]), torch.ones(1), (4,))}, {}, "", {})
    with pytest.raises(MethodError, match="use pruned='kept'"):
        unmask.select(model, method, new=".*", avoid=taken)
    kept = unmask.sparse_adapter(4, criterion="magnitude", pruned="kept")
    assert unmask.select(model, kept, new=".*", avoid=taken).budget == 4


def test_a_resumed_run_needs_the_same_deltas(tmp_path):
    first, second = (delta_of(mlp(), unmask.random_mask(20, seed=s)) for s in (0, 1))

    def start(avoid):
        torch.manual_seed(0)
        model = mlp()
        selection = unmask.select(model, unmask.id3(12, 4), avoid=avoid)
        return model, selection, torch.optim.SGD(selection.parameters(), lr=0.1)

    model, selection, optimizer = start([first, second])
    train(model, optimizer, batches(2))
    state = read_state(write_state(selection.state_dict(), tmp_path / "state.safetensors"))
    train(model, optimizer, batches(4)[2:])
    resumed, again, optimizer = start([second, first])  # in any order
    again.load_state_dict(state)
    train(resumed, optimizer, batches(4)[2:])
    assert again.values.equal(selection.values)
    assert again.ledger.positions.equal(selection.ledger.positions)
    for avoid in (first, None):
        with pytest.raises(SelectionError, match="another avoid"):
            start(avoid)[1].load_state_dict(state)
    with pytest.raises(SelectionError, match="another avoid"):
        again.load_state_dict(start(None)[1].state_dict())


@pytest.mark.parametrize("method", ["id3", "random_mask", "id3_rows"])
def test_several_processes(method, tmp_path):
    taken = runs.masked(nets.mixed(), seed=9)
    alone = runs.trained(method, avoid=taken)
    outside = flat_mask(entries_of(taken), nets.mixed())
    assert not outside[alone[0]].any()
    for exchange in ("exact", "candidates") if method == "id3" else ("exact",):
        folder = tmp_path / exchange
        for positions, values, _ in processes.run(
            2, folder, functools.partial(runs.trained, avoid=taken), method, exchange
        ):
            assert positions.equal(alone[0])
            torch.testing.assert_close(values, alone[1])


def test_processes_that_avoid_other_weights_are_refused(tmp_path):
    for error in processes.run(2, tmp_path, runs.avoiding_differently):
        assert "the weights to avoid" in error


@pytest.mark.parametrize("method", ["id3", "random_mask", "pafi"])
def test_a_sharded_model(method, tmp_path):
    taken = runs.masked(runs.blocks(), seed=9)
    alone = runs.fsdp(method, avoid=taken)
    outside = flat_mask(entries_of(taken), runs.blocks())
    assert not outside[alone["positions"]].any()
    for together in processes.run(2, tmp_path, functools.partial(runs.fsdp, avoid=taken), method):
        assert together["positions"].equal(alone["positions"])
