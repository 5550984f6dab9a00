"""Checks that a method that cannot work is refused when it is built, and that every other composition meets b(t)."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import as_lists, assert_same_tensors, batches, dense_gradients, first_k, mean_square, mlp, snapshot, train
from torch import nn

import unmask
from unmask import Budget, MethodError, NonFiniteGradientError
from unmask.methods.heuristics import Heuristic
from unmask.ranking import ranker as streamed

# Budgets.


@pytest.mark.parametrize(
    "budget",
    [
        0,
        -1,
        "0",
        "-5",
        "0%",
        "101%",
        "-1%",
        "nan%",
        "inf%",
        "%",
        "",
        "abc",
        "1.5",
        "--5",
        "²",
        "1__0",
        True,
        1.5,
        b"3",
        "9" * 5000,
        "1.5K of",
        "2M of 1M",
        "1 of 0",
        "5 of eligible",
        "7 eligible",
        "50% of 184M of",
        "1.0005K",
    ],
)
def test_an_invalid_budget_is_refused_by_every_preset(budget):
    for preset in (unmask.pafi, unmask.static_d3, unmask.repeat_d3, unmask.random_mask, unmask.bitfit):
        with pytest.raises(MethodError, match="budget ="):
            preset(budget)
    with pytest.raises(MethodError, match="budget ="):
        unmask.id3(budget, steps=3)


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        (1, 1),
        ("7", 7),
        ("1_00", 100),
        (126, 126),
        ("100%", 126),
        ("50%", 63),
        ("0.0001%", 1),
        (" 5 ", 5),
        ("0.1K", 100),
        ("103K of 184M", 1),
        ("1K of 2k", 63),
        ("92M of 184M", 63),
        ("100% eligible", 126),
    ],
)
def test_a_budget_is_a_count_or_a_share_of_the_models_parameters(budget, count):
    selection = unmask.select(mlp(), unmask.pafi(budget))
    assert (selection.budget, selection.values.numel(), selection.used) == (count, count, count)


@pytest.mark.parametrize(
    ("budget", "count"), [("50% of eligible", 21), ("1K of 2K eligible", 21), ("50%", 63), ("4% eligible", 2)]
)
def test_a_share_may_be_of_the_eligible_weights(budget, count):
    eligible = {"include": r"^0"} if "eligible" in budget else {}
    assert sum(p.numel() for n, p in mlp().named_parameters() if n.startswith("0")) == 42
    assert unmask.select(mlp(), unmask.pafi(budget), **eligible).budget == count


def test_a_ratio_is_exact_and_a_share_of_an_unknown_number_is_refused():
    assert Budget.parse("320K of 184M").of(184_000_000) == 320_000
    assert Budget.parse("320K") == Budget.parse(320_000) != Budget.parse("320K of 1.33M eligible")
    with pytest.raises(MethodError, match="not known here"):
        Budget.parse("4% of eligible").of(1000)


@pytest.mark.parametrize(("budget", "patterns"), [(127, {}), (43, {"include": "^0"}), ("100%", {"exclude": "bias"})])
def test_a_budget_above_the_eligible_weights_is_refused_and_the_model_left_alone(budget, patterns):
    model = mlp()
    with pytest.raises(MethodError, match="are eligible"):
        unmask.select(model, unmask.id3(budget, steps=3), **patterns)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())


# Names and parameters.


@pytest.mark.parametrize(
    "build",
    [
        lambda: unmask.heuristic("d4"),
        lambda: unmask.heuristic("d3", epsilon=1.0),
        lambda: unmask.heuristic("random", exp=1.0),
        lambda: unmask.heuristic("gradient", seed=1),
        lambda: unmask.pafi(3).but(strategy="incremental"),
        lambda: unmask.pafi(3).but(allocation="layer"),
        lambda: unmask.pafi(3).but(heuristic="snip"),
        lambda: unmask.pafi(3).but(schedule="cosine"),
        lambda: unmask.pafi(3).but(heuristic=unmask.heuristic("fisher")),
        lambda: unmask.fish(3, []).but(strategy="repeat"),
        lambda: unmask.id3(3, steps=2, schedule="linear"),
        lambda: unmask.fish(3, [], num_samples=0),
        lambda: unmask.fish(3, [], sample_type="labels"),
        lambda: unmask.fish(3, [], grad_type="cube"),
        lambda: unmask.fish(3, [], sample_type="expect", loss=lambda m, b: m(b)),
        lambda: unmask.register_heuristic("d3", lambda w, g: g),
        lambda: unmask.register_heuristic("mine", lambda w, g: g, needs="fisher"),
    ],
)
def test_parts_that_cannot_work_are_refused_when_they_are_built(build, registry):
    known = set(registry)
    with pytest.raises(MethodError):
        build()
    assert set(registry) == known


@pytest.mark.parametrize(
    "preset",
    [
        lambda **k: unmask.id3(3, steps=2, **k),
        lambda **k: unmask.static_d3(3, **k),
        lambda **k: unmask.repeat_d3(3, **k),
    ],
)
@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf])
def test_an_eps_that_lets_zero_weights_divide_by_zero_is_refused(preset, eps):
    with pytest.raises(MethodError, match="eps ="):
        preset(eps=eps)
    if eps == 0.0:
        assert preset(eps=eps, exp=-1.0).heuristic.parameters == {"eps": 0.0, "exp": -1.0}


@pytest.mark.parametrize("argument", ["include", "exclude", "dense", "new"])
@pytest.mark.parametrize(
    ("pattern", "why"), [("nothing_here", "found in no parameter name"), ("(", "not a regular expression")]
)
def test_a_pattern_that_finds_nothing_or_is_invalid_is_refused(argument, pattern, why):
    with pytest.raises(MethodError, match=f"{argument}: .* {why}" if why[0] == "n" else why):
        unmask.select(mlp(), unmask.pafi(3), **{argument: ["weight", pattern] if argument == "include" else pattern})


@pytest.mark.parametrize(
    ("model", "kwargs", "why"),
    [
        (mlp(), {"include": "0", "exclude": "0"}, "no tensor is left"),
        (mlp(), {"include": "0", "exclude": "0", "dense": "^4"}, "leave no tensor for the budget"),
        (mlp(), {"dense": "."}, "leave no tensor for the budget"),
        (nn.Tanh(), {}, "has no parameters"),
        (mlp(), {"accumulation": "both"}, "accumulation ="),
        (
            nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2).int(), False)]),
            {"dense": "1"},
            "int32",
        ),
    ],
)
def test_a_selection_of_nothing_is_refused(model, kwargs, why):
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(MethodError, match=why):
        unmask.select(model, unmask.bitfit(1).but(scope=unmask.Scope("all")), **kwargs)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_embedding_that_rewrites_its_rows_in_every_forward_is_refused_unless_dense():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 2))
    for kwargs in ({}, {"exclude": "^0"}):
        with pytest.raises(MethodError, match=r"0 has max_norm = 0\.5"):
            unmask.select(model, unmask.pafi(3), **kwargs)
    assert unmask.select(model, unmask.pafi(3), dense="^0").dense_numel == 15


# Heuristics.


def test_pafi_takes_the_smallest_weights():
    model = mlp()
    scores = {name: -p.detach().abs() for name, p in model.named_parameters()}
    assert as_lists(unmask.select(model, unmask.pafi(30)).indices) == first_k(scores, 30)


def test_a_random_mask_follows_from_its_seed_and_spreads_evenly():
    masks = [as_lists(unmask.select(mlp(width=30), unmask.random_mask(900, seed=seed)).indices) for seed in (0, 0, 1)]
    assert masks[0] == masks[1] != masks[2]
    share = sum(map(len, masks[0].values())) / (3 * 30 * 31)
    for name in ("0.weight", "2.weight", "4.weight"):
        assert len(masks[0][name]) / 900 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("name", ["d3", "gradient", "snip"])
def test_gradient_heuristics_rank_as_their_formula(name):
    model, x = mlp(), batches(1)[0]
    gradients = dense_gradients(model, lambda m: mean_square(m, x))
    formula = {
        "d3": lambda w, g: g.abs() / (w.abs() + 1) ** 2,
        "gradient": lambda w, g: g.abs(),
        "snip": lambda w, g: (g * w).abs(),
    }
    scores = {n: formula[name](p.detach(), gradients[n]) for n, p in model.named_parameters()}
    selection = unmask.select(model, unmask.static_d3(20).but(heuristic=unmask.heuristic(name)))
    train(model, torch.optim.SGD(selection.parameters(), lr=0.1), [x])
    assert as_lists(selection.indices) == first_k(scores, 20)


@pytest.mark.parametrize("function", [lambda w, g: w, lambda w, g: g], ids=["weight", "gradient"])
def test_a_heuristic_may_return_the_weight_or_the_gradient_itself(function, registry):
    model = mlp()
    base = snapshot(model)
    method = unmask.id3(20, steps=4).but(heuristic=unmask.register_heuristic("itself", function))
    selection = unmask.select(model, method)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
    for x in batches(4):
        before = snapshot(model)
        mean_square(model, x).backward()
        assert_same_tensors(before, snapshot(model))
        optimizer.step()
    moved = sum(int((tensor != base[name]).sum()) for name, tensor in snapshot(model).items())
    assert moved == selection.used == 20


@pytest.mark.parametrize(
    ("function", "error", "why"),
    [
        (lambda w, g: g.abs().log(), NonFiniteGradientError, "-inf"),
        (lambda w, g: w.where(w > 0, -torch.inf), NonFiniteGradientError, "-inf"),
        (lambda w, g: 1 / g, NonFiniteGradientError, "inf"),
        (lambda w, g: g * torch.nan, NonFiniteGradientError, "nan"),
        (lambda w, g: g.sum(-1), MethodError, "one score per weight"),
    ],
)
def test_scores_that_give_no_ranking_are_refused_and_nothing_is_changed(function, error, why, registry):
    model = mlp(depth=2)
    before = snapshot(model)
    heuristic = unmask.register_heuristic("odd", function)
    selection = unmask.select(model, unmask.static_d3(3).but(heuristic=heuristic))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    with pytest.raises(error, match=why):  # noqa: PT012
        (model(batches(1)[0]).square().sum() * 0).backward()  # every gradient is zero
        optimizer.step()
    assert_same_tensors(before, snapshot(model))


def test_a_heuristic_that_looks_at_whole_tensors_gets_them(registry, monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK", 7)
    shapes = []

    def normed(weight, gradient):
        shapes.append(weight.numel())
        return gradient.abs() / gradient.abs().sum()

    model = mlp()
    heuristic = unmask.register_heuristic("normed", normed, elementwise=False)
    unmask.select(model, unmask.static_d3(5).but(heuristic=heuristic))
    mean_square(model, batches(1)[0]).backward()
    assert sorted(shapes) == [6] * 3 + [36] * 3


# Any heuristic, any strategy, any allocation.

HEURISTICS = ["d3", "gradient", "snip", "small_magnitude", "random", "constant"]


@pytest.mark.parametrize("block", [5, 1 << 20])
@pytest.mark.parametrize("allocation", ["global", "tensor", "row"])
@pytest.mark.parametrize("strategy", ["static", "increment", "repeat"])
@pytest.mark.parametrize("heuristic", HEURISTICS)
def test_any_composition_meets_the_schedule_and_the_caps(heuristic, strategy, allocation, block, monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK", block)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3), nn.LayerNorm(3))
    B, N = 47, 99
    method = unmask.Method(
        *("any", B, unmask.heuristic(heuristic), strategy),
        schedule=unmask.Schedule.of("uniform", 4, stride=1 if strategy == "repeat" else 2),
        allocation=allocation,
    )
    base, selection = snapshot(model), unmask.select(model, method)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1, weight_decay=0.1)
    for t, x in enumerate(batches(5)):
        train(model, optimizer, [x])
        indices = selection.indices
        assert selection.used == method.cumulative(t, B) == sum(flat.numel() for flat in indices.values())
        for name, flat in indices.items():
            assert flat.tolist() == sorted(set(flat.tolist()))
            shape = base[name].shape
            columns = shape[-1] if allocation == "row" else base[name].numel()
            counts = torch.bincount(flat // columns)
            if allocation != "global":
                assert counts.max() <= math.ceil(B * columns / N)
    assert selection.used == B


@pytest.mark.parametrize("allocation", ["tensor", "row"])
def test_a_vector_longer_than_a_block_has_one_bound(allocation, monkeypatch):
    monkeypatch.setattr(streamed, "BLOCK", 4)
    model = nn.ParameterDict({"long": torch.randn(40), "other": torch.randn(5, 8)})
    selection = unmask.select(model, unmask.pafi(20).but(allocation=allocation))
    assert {name: flat.numel() for name, flat in selection.indices.items()} == {"long": 10, "other": 10}


def test_a_method_is_frozen_and_describes_itself_in_json_values():
    method = unmask.id3(5, steps=3, exp=0.0, stride=2, schedule="cosine")
    with pytest.raises(AttributeError):
        method.budget = 6
    assert method.describe() == {
        "name": "id3", "heuristic": "d3", "parameters": {"eps": 1.0, "exp": 0.0}, "strategy": "increment",
        "schedule": "cosine", "steps": 3, "stride": 2, "scope": "all", "patterns": [], "allocation": "global",
    }  # fmt: skip
    assert isinstance(method.but(heuristic=unmask.heuristic("snip")).heuristic, Heuristic)
    assert method.heuristic.name == "d3"


def _score(w, g):
    return w.abs()


def _other_score(w, g):
    return -w.abs()


def test_a_heuristic_is_replaced_only_when_asked_or_by_a_cell_that_is_run_again(registry, monkeypatch):
    unmask.register_heuristic("mine", _score)
    with pytest.raises(MethodError, match="already registered; give overwrite=True"):
        unmask.register_heuristic("mine", _other_score)
    assert unmask.heuristic("mine").function is _score
    assert unmask.register_heuristic("mine", _other_score, overwrite=True).function is _other_score
    monkeypatch.setattr(_score, "__module__", "__main__")
    with pytest.raises(MethodError, match="already registered"):
        unmask.register_heuristic("mine", _score)  # The registered function is not one of the notebook.
    monkeypatch.setattr(_other_score, "__module__", "__main__")
    assert unmask.register_heuristic("mine", _score).function is _score


@pytest.mark.parametrize("name", ["d3", "fisher", "magnitude"])
def test_the_librarys_own_heuristics_cannot_be_replaced(registry, name):
    with pytest.raises(MethodError, match=f"heuristic '{name}' is the library's own"):
        unmask.register_heuristic(name, _score, overwrite=True)


def test_the_old_name_of_small_magnitude_is_refused_with_the_new_one():
    with pytest.raises(MethodError, match="heuristic 'magnitude' is called 'small_magnitude' here"):
        unmask.heuristic("magnitude")


@pytest.mark.parametrize(
    "method",
    [
        unmask.id3("0.17%", steps=10, schedule=lambda t, T, B: B),
        unmask.fish(3, [{"x": torch.ones(2)}], loss=lambda m, b: m(b)),
        unmask.full().but(scope=unmask.Scope.patterns("a", "b")),
        unmask.repeat_d3(5, leaving="kept"),
    ],
    ids=lambda method: method.name,
)
def test_a_method_is_shown_in_one_line_without_addresses(method):
    shown = repr(method)
    assert shown.startswith(f"{method.name}(")
    assert "\n" not in shown
    assert " at 0x" not in shown
    assert len(shown) < 250
    for value in method.describe().values():
        assert str(value) in shown or value in ({}, [])


def test_an_invalid_scope_is_refused():
    for wrong in (
        lambda: unmask.Scope("lines"),
        lambda: unmask.Scope("patterns"),
        lambda: unmask.Scope("linear", ("a",)),
    ):
        with pytest.raises(MethodError, match="scope = "):
            wrong()
    with pytest.raises(MethodError, match=r"scope = 'linear'; build one, for example with unmask\.Scope"):
        unmask.pafi(3).but(scope="linear")
