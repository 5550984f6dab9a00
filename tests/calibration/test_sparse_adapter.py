"""Checks that each criterion of SparseAdapter equals a dense reference by hand, and that pruned weights stay zero."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import as_lists, assert_same_tensors, first_k, snapshot, train
from lora_nets import adapted, cross_entropy, labelled, lora_bert, sentences
from torch import Tensor, nn

import unmask
from unmask import MethodError
from unmask.calibration import synflow
from unmask.calibration.pruning import connection_sensitivity, gradient_flow
from unmask.calibration.synflow import synaptic_flow
from unmask.methods.method import Calibration
from unmask.ranking.ledger import Layout

INSIDE = r"^(one|two)\."
CRITERIA = ["random", "magnitude", "snip", "grasp", "synflow"]
DATA = labelled((4, 4, 3))


def inside(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in sorted(model.named_parameters()) if name.startswith(("one.", "two."))}


def laid_out(model: nn.Module) -> Layout:
    named = inside(model)
    return Layout(list(named), list(named.values()))


def by_name(layout: Layout, scores: dict[int, Tensor]) -> dict[str, Tensor]:
    return {layout.names[i]: score for i, score in scores.items()}


def mean_loss(model: nn.Module) -> Tensor:
    """Returns the mean over all examples, which does not depend on their batches."""
    return cross_entropy(model, (torch.cat([x for x, _ in DATA]), torch.cat([y for _, y in DATA])))


def pruned(model: nn.Module, budget: int, criterion: str, **changes: object) -> unmask.Selection:
    method = unmask.sparse_adapter(budget, criterion, DATA, loss=cross_entropy, **changes)
    return unmask.select(model, method, include=INSIDE, new=INSIDE)


# The scores.


def test_snip_is_weight_times_the_gradient_of_the_mean_loss() -> None:
    model = adapted()
    layout = laid_out(model)
    scores = by_name(layout, connection_sensitivity(model, layout, Calibration(DATA, loss=cross_entropy)))
    twin = copy.deepcopy(model)
    mean_loss(twin).backward()
    for name, p in inside(twin).items():
        torch.testing.assert_close(scores[name], (p.grad * p.detach()).abs(), rtol=1e-10, atol=1e-14)


def test_grasp_is_weight_times_a_row_of_the_dense_hessian_times_the_gradient() -> None:
    model = adapted()
    layout = laid_out(model)
    scores = by_name(layout, gradient_flow(model, layout, Calibration(DATA, loss=cross_entropy)))
    tensors = dict(inside(model))
    flat = torch.cat([p.detach().reshape(-1) for p in tensors.values()])

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in tensors.values()])
        given = {name: part.view_as(p) for (name, p), part in zip(tensors.items(), parts, strict=True)}
        logits = torch.func.functional_call(model, given, (torch.cat([x for x, _ in DATA]),))
        return torch.nn.functional.cross_entropy(logits, torch.cat([y for _, y in DATA]))

    hessian = torch.autograd.functional.hessian(loss, flat)
    gradient = torch.autograd.functional.jacobian(loss, flat)
    expected = flat * (hessian @ gradient)
    torch.testing.assert_close(
        torch.cat([scores[name].reshape(-1) for name in tensors]), expected, rtol=1e-8, atol=1e-12
    )
    assert expected.abs().max() > 1e-4


def test_grasp_differentiates_attention_twice() -> None:
    """Checks that the scores are those of plain attention: fused attention has no second derivative."""
    results = []
    for attention in ("sdpa", "eager"):
        model = lora_bert(attention=attention, init_lora_weights=False)
        names = sorted(name for name, _ in model.named_parameters() if "lora_" in name)
        layout = Layout(names, [model.get_parameter(name) for name in names])
        results.append(gradient_flow(model, layout, Calibration(sentences(1))))
    for fused, plain in zip(results[0].values(), results[1].values(), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-6 * plain.abs().max().item() + 1e-9)


def test_synflow_of_one_round_is_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks R = 1'(|U| (|D| 1 + |d|) + |u|): a path's flow is the product of the flow into it and the flow out of it."""
    monkeypatch.setattr(synflow, "ROUNDS", 1)
    model = adapted()
    layout = laid_out(model)
    scores = by_name(layout, synaptic_flow(model, layout, budget=7))
    for name in ("one", "two"):
        module = model.get_submodule(name)
        down, up = module.adapter_down[0], module.adapter_up
        D, d, U, u = (p.detach().abs() for p in (down.weight, down.bias, up.weight, up.bias))
        onward = U.sum(0)  # This is how much of each narrow unit reaches the sum of outputs.
        torch.testing.assert_close(scores[f"{name}.adapter_down.0.weight"], D * onward[:, None])
        torch.testing.assert_close(scores[f"{name}.adapter_down.0.bias"], d * onward)
        torch.testing.assert_close(scores[f"{name}.adapter_up.weight"], U * (D.sum(1) + d))
        torch.testing.assert_close(scores[f"{name}.adapter_up.bias"], u)


def test_synflow_falls_exponentially_and_ends_at_the_budget() -> None:
    model, budget = adapted(), 20
    total = sum(p.numel() for p in inside(model).values())
    selection = pruned(model, budget, "synflow")
    assert as_lists(selection.indices) == _synflow_by_hand(adapted(), budget, total)


def _synflow_by_hand(model: nn.Module, budget: int, total: int) -> dict[str, list[int]]:
    """Runs the same loop on a network that is pruned round by round."""
    with torch.no_grad():
        for p in inside(model).values():
            p.abs_()
    kept: dict[str, list[int]] = {}
    for k in range(1, 101):
        model.zero_grad()
        flow = [m.adapter_up(m.adapter_down(torch.ones(6, dtype=torch.float64))).sum() for m in (model.one, model.two)]
        sum(flow).backward()
        scores = {name: (p.grad * p).detach() for name, p in inside(model).items()}
        if kept:
            for name, score in scores.items():
                dead = torch.ones(score.numel(), dtype=torch.bool)
                dead[torch.tensor(kept.get(name, []), dtype=torch.int64)] = False
                score.view(-1)[dead] = -1.0
        kept = first_k(scores, max(budget, round(total * (budget / total) ** (k / 100))))
        with torch.no_grad():
            for name, p in inside(model).items():
                mask = torch.zeros(p.numel(), dtype=p.dtype)
                mask[torch.tensor(kept.get(name, []), dtype=torch.int64)] = 1.0
                p.mul_(mask.view_as(p))
    return kept


def test_synflow_in_dora_counts_the_magnitude() -> None:
    model = lora_bert(use_dora=True, init_lora_weights=False, target_modules=["value"])
    names = sorted(name for name, _ in model.named_parameters() if "lora_" in name)
    layout = Layout(names, [model.get_parameter(name) for name in names])
    synflow_rounds, synflow.ROUNDS = synflow.ROUNDS, 1
    try:
        scores = by_name(layout, synaptic_flow(model, layout, 5))
    finally:
        synflow.ROUNDS = synflow_rounds
    place = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_"
    a, b = (model.get_parameter(f"{place}{x}.default.weight").detach().double().abs() for x in "AB")
    m = model.get_parameter(f"{place}magnitude_vector.default.weight").detach().double().abs().view(-1)
    expected = a * (b * m[:, None]).sum(0)[:, None]
    torch.testing.assert_close(scores[f"{place}A.default.weight"].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        scores[f"{place}magnitude_vector.default.weight"].double().view(-1), m * (b @ a.sum(1)), rtol=1e-6, atol=0
    )


# The weights that stay, and the others.


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("rest", ["zero", "kept"])
def test_pruned_weights_are_zero_or_at_their_initial_values_and_stay_so(criterion: str, rest: str) -> None:
    model = adapted(torch.float32)
    initial, data = snapshot(model), labelled((4, 4, 3), torch.float32)
    method = unmask.sparse_adapter(20, criterion, data, loss=cross_entropy, pruned=rest)
    selection = unmask.select(model, method, include=INSIDE, new=INSIDE)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05, weight_decay=0.1)
    train(model, optimizer, data * 3, cross_entropy)  # type: ignore[arg-type]
    assert selection.used == 20
    moved = 0
    for name, p in model.named_parameters():
        kept = torch.zeros(p.numel(), dtype=torch.bool)
        kept[selection.indices.get(name, torch.empty(0, dtype=torch.int64))] = True
        outside = p.detach().reshape(-1)[~kept]
        if rest == "zero" and name in inside(model):
            assert not outside.any(), name
        else:
            assert torch.equal(outside, initial[name].reshape(-1)[~kept]), name
        moved += int((p.detach().reshape(-1)[kept] != initial[name].reshape(-1)[kept]).sum())
    assert moved > 10


@pytest.mark.parametrize("criterion", ["magnitude", "snip", "grasp"])
def test_the_weights_that_stay_are_the_best_by_a_plain_sort(criterion: str) -> None:
    model = adapted()
    layout = laid_out(model)
    calibration = Calibration(DATA, loss=cross_entropy)
    scores = {
        "magnitude": lambda: {name: p.detach().abs() for name, p in inside(model).items()},
        "snip": lambda: by_name(layout, connection_sensitivity(model, layout, calibration)),
        "grasp": lambda: by_name(layout, gradient_flow(model, layout, calibration)),
    }[criterion]()
    expected = first_k(scores, 25)
    assert as_lists(pruned(model, 25, criterion).indices) == expected


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_a_calibration_leaves_the_model_as_it_was(criterion: str) -> None:
    model = adapted()
    model.head.requires_grad_(False)
    model.first.eval()
    before, flags = snapshot(model), {name: p.requires_grad for name, p in model.named_parameters()}
    pruned(model, 20, criterion, pruned="kept").release()
    assert_same_tensors(snapshot(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert (model.first.training, model.second.training) == (False, True)


@pytest.mark.parametrize("rest", ["zero", "kept"])
def test_the_delta_holds_the_pruned_module_whole(rest: str, tmp_path) -> None:
    model, fresh = adapted(seed=1), adapted(seed=1)
    for module in (fresh.one, fresh.two):  # A fresh process draws other adapters on the same base.
        for p in module.parameters():
            nn.init.normal_(p)
    before = snapshot(fresh)
    selection = pruned(model, 20, "snip", pruned=rest)
    train(model, torch.optim.Adam(selection.parameters(), lr=0.1), DATA, cross_entropy)  # type: ignore[arg-type]
    delta = unmask.SparseDelta.load(selection.delta().save(tmp_path / "delta.safetensors"))
    displaced = delta.apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(model))
    assert (len(delta), set(delta.whole)) == (20, set(inside(model)))
    displaced.apply(fresh)
    assert_same_tensors(snapshot(fresh), before)


def test_a_resumed_run_is_pruned_alike() -> None:
    models = [adapted() for _ in range(3)]
    whole, first, second = (pruned(model, 20, "grasp") for model in models)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    train(models[0], optimizer, DATA * 2, cross_entropy)  # type: ignore[arg-type]
    train(models[1], torch.optim.SGD(first.parameters(), lr=0.1), DATA, cross_entropy)  # type: ignore[arg-type]
    second.load_state_dict(first.state_dict())
    train(models[2], torch.optim.SGD(second.parameters(), lr=0.1), DATA, cross_entropy)  # type: ignore[arg-type]
    assert_same_tensors(snapshot(models[0]), snapshot(models[2]))


def test_resuming_with_other_calibration_data_is_refused_and_changes_nothing() -> None:
    models = [adapted(), adapted()]
    saved = pruned(models[0], 20, "snip")
    other = unmask.sparse_adapter(20, "snip", labelled((2,)), loss=cross_entropy)
    resumed = unmask.select(models[1], other, include=INSIDE, new=INSIDE)
    assert as_lists(saved.indices) != as_lists(resumed.indices)
    before = snapshot(models[1])
    with pytest.raises(unmask.SelectionError, match="other weights than those the saved selection started from"):
        resumed.load_state_dict(saved.state_dict())
    assert_same_tensors(snapshot(models[1]), before)


# Refusals.


def assert_refused(match: str, model: nn.Module, method: unmask.Method, **patterns: object) -> None:
    before = snapshot(model)
    with pytest.raises(MethodError, match=match):
        unmask.select(model, method, **patterns)
    assert_same_tensors(snapshot(model), before)


def test_pruning_the_base_is_refused() -> None:
    assert_refused("is a tensor of the base model", adapted(), unmask.sparse_adapter(5, "magnitude"))
    assert_refused("is a tensor of the base model", lora_bert(), unmask.sparse_adapter(5, "magnitude"))


@pytest.mark.parametrize("criterion", ["snip", "synflow"])
def test_a_criterion_that_vanishes_in_a_fresh_lora_is_refused(criterion: str) -> None:
    method = unmask.sparse_adapter(40, criterion, sentences(1))
    assert_refused("zero for every eligible weight.*init_lora_weights", lora_bert(), method, include="lora_")


def test_a_lora_whose_b_is_pruned_away_is_refused_and_a_share_of_each_tensor_avoids_that() -> None:
    method = unmask.sparse_adapter(40, "magnitude")
    assert_refused("LoRA's A alone", lora_bert(), method, include="lora_")
    selection = unmask.select(lora_bert(), method.but(allocation="tensor"), include="lora_")
    assert {name.split("lora_")[1][0] for name in selection.indices} == {"A", "B"}


@pytest.mark.parametrize(
    ("match", "build"),
    [
        ("criterion =", lambda: unmask.sparse_adapter(5, "wanda")),
        ("unselected =", lambda: unmask.sparse_adapter(5, pruned="half")),
        ("must be known then", lambda: unmask.id3(5, steps=2).but(unselected="zero")),
        ("must be known then", lambda: unmask.repeat_d3(5).but(unselected="zero")),
        ("must be known then", lambda: unmask.full().but(unselected="zero")),
        ("allocation='global'", lambda: unmask.sparse_adapter(5, "synflow").but(allocation="row")),
        ("needs a calibration", lambda: unmask.pafi(5).but(heuristic=unmask.heuristic("grasp"))),
    ],
)
def test_a_method_that_cannot_work_is_refused_when_it_is_built(match: str, build) -> None:
    with pytest.raises(MethodError, match=match):
        build()


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_data_that_cannot_be_used_is_refused(criterion: str) -> None:
    patterns = {"include": INSIDE, "new": INSIDE}
    assert_refused(
        "loader is empty", adapted(), unmask.sparse_adapter(5, criterion, [], loss=cross_entropy), **patterns
    )
    broken = [(torch.full((2, 5), torch.nan, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(unmask.NonFiniteGradientError, match="is not finite"):
        unmask.select(adapted(), unmask.sparse_adapter(5, criterion, broken, loss=cross_entropy), **patterns)


def test_grasp_from_a_generator_that_runs_dry_is_refused() -> None:
    once = iter(DATA)
    assert_refused(
        "the second time",
        adapted(),
        unmask.sparse_adapter(5, "grasp", once, loss=cross_entropy),
        include=INSIDE,
        new=INSIDE,
    )


def test_synflow_outside_added_layers_is_refused() -> None:
    assert_refused("no part of one", adapted(), unmask.sparse_adapter(5, "synflow"), include=r"head", new="head")
