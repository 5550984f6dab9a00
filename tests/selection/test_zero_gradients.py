"""Tests that a gradient of zero selects nothing: the schedule waits for another one, and one warning says so."""

from __future__ import annotations

import copy
import warnings

import processes
import pytest
import torch
import zero_runs as runs
from helpers import as_lists, assert_same_tensors, assert_unselected_is_base, batches, mean_square, mlp, snapshot
from nets import loss, mixed, tokens
from peft_nets import OLD_NAMES, config
from reference import DenseReference
from torch import Tensor, nn
from torch.nn import functional as F

import peft
import unmask
from unmask import UnmaskWarning

B, T = 60, 6
METHODS = {
    "static_d3": lambda: unmask.static_d3(B),
    "id3": lambda: unmask.id3(B, T),
    "strided": lambda: unmask.id3(B, T, stride=3),
    "snip": lambda: unmask.id3(B, T).but(heuristic=unmask.heuristic("snip")),
    "by rows": lambda: unmask.id3(B, T).but(allocation="row"),
    "repeat_d3": lambda: unmask.repeat_d3(B, stride=3),
    "kept": lambda: unmask.repeat_d3(B, stride=3, leaving="kept"),
}


def masked(model: nn.Module, batch: Tensor) -> Tensor:
    """Returns the loss of a batch whose labels are all -100: NaN, with a gradient of zero."""
    labels = torch.full_like(batch[:, 1:], -100)
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), labels.flatten())


def take(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, silent: bool = False) -> None:
    (masked if silent else loss)(model, tokens(step)).backward()
    optimizer.step()
    optimizer.zero_grad()


def begin(name: str, **options):
    model = mixed()
    selection = unmask.select(model, METHODS[name](), **options)
    return model, selection, torch.optim.SGD(selection.parameters(), lr=0.3)


@pytest.mark.parametrize("accumulation", ["candidates", "exact"])
@pytest.mark.parametrize("gradients", ["auto", "dense"])
@pytest.mark.parametrize("name", METHODS)
def test_a_first_batch_without_a_gradient_selects_nothing_and_the_next_one_makes_up_for_it(
    name, gradients, accumulation
):
    model, selection, optimizer = begin(name, gradients=gradients, accumulation=accumulation)
    base = snapshot(model)
    with pytest.warns(UnmaskWarning, match=r"^step 0 was to select \d+ weights and selected 0: .*-100") as said:
        take(model, optimizer, 0, silent=True)
    assert (selection.used, selection.indices, selection.step) == (0, {}, 1)
    assert_same_tensors(base, snapshot(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning came once already
        take(model, optimizer, 1, silent=True)
        take(model, optimizer, 2)
    assert len(said) == 1
    assert selection.used == selection.method.cumulative(2, B)
    assert_unselected_is_base(model, base, selection)
    picked = as_lists(selection.indices)
    twin, other, plain = begin(name, gradients=gradients)
    if other.method.cumulative(0, B) == selection.used:  # otherwise one step selects what is due in two
        take(twin, plain, 2)
        assert as_lists(other.indices) == picked
        assert_same_tensors(snapshot(twin), snapshot(model))


@pytest.mark.parametrize("name", ["static_d3", "id3", "strided", "snip"])
@pytest.mark.parametrize("silent", [{0}, {1, 2}, {0, 3, 5}])
def test_the_run_is_the_dense_reference_s_if_some_steps_have_no_gradient(name, silent):
    model, method = mixed(), METHODS[name]()
    names = [n for n, _ in model.named_parameters()]
    heuristic = method.heuristic
    reference = DenseReference(
        mixed(), names, heuristic.score, lambda t: method.cumulative(t, B), B, above=0.0, lr=0.01, weight_decay=0.1
    )
    selection = unmask.select(model, method, gradients="dense")
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.01, weight_decay=0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for t in range(8):
            take(model, optimizer, t, t in silent)
            reference.step(lambda m, t=t: 0.0 * loss(m, tokens(t)) if t in silent else loss(m, tokens(t)))
            assert selection.used == int(reference.mask.sum())
            assert t in silent or selection.used == method.cumulative(t, B)
    behind = any(method.cumulative(t, B) > (0 if t == 0 else method.cumulative(t - 1, B)) for t in silent)
    assert sum(w.category is UnmaskWarning for w in said) == behind
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, dict(reference.model.named_parameters())[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["repeat_d3", "kept"])
def test_repeat_keeps_its_picks_and_their_values_through_a_step_without_a_gradient(name):
    model, selection, optimizer = begin(name)
    for t in range(3):
        take(model, optimizer, t)
    picked, before = as_lists(selection.picked), snapshot(model)
    with pytest.warns(UnmaskWarning, match="step 3 was to select 60 weights and selected 0.*stay what they were"):
        take(model, optimizer, 3, silent=True)
    assert as_lists(selection.picked) == picked
    assert_same_tensors(snapshot(model), before)
    take(model, optimizer, 4)
    assert as_lists(selection.picked) == picked  # the next selecting step is 6
    take(model, optimizer, 5)
    take(model, optimizer, 6)
    assert as_lists(selection.picked) != picked
    assert sum(map(len, as_lists(selection.picked).values())) == B


class Halves(nn.Module):
    """Two parallel layers; a batch reaches one of them, or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, which: str) -> Tensor:
        return sum(getattr(self, name)(x).square().mean() for name in which.split())


def halves(method: unmask.Method, **options):
    model = Halves()
    selection = unmask.select(model, method, **options)
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)

    def step(*parts: str) -> dict[str, int]:
        for which in parts:
            model(batches(1, width=4)[0], which).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: flat.numel() for name, flat in selection.indices.items()}

    return model, selection, step


def test_where_fewer_weights_have_a_gradient_than_are_due_these_are_selected_and_the_rest_later():
    _, selection, step = halves(unmask.static_d3(24))
    with pytest.warns(UnmaskWarning, match="was to select 24 weights and selected 16"):
        assert step("left") == {"left.weight": 16}
    assert step("left") == {"left.weight": 16}
    held = selection.ledger.positions[:16].clone()
    assert step("right") == {"left.weight": 16, "right.weight": 8}
    assert torch.equal(selection.ledger.positions[:16], held)


@pytest.mark.filterwarnings("ignore:step .* was to select:unmask.UnmaskWarning")
def test_repeat_fills_its_empty_places_first_and_lets_go_only_for_what_has_a_gradient():
    model, selection, step = halves(unmask.repeat_d3(20))
    base = snapshot(model)
    assert step("left") == {"left.weight": 16}
    assert step("right") == {"left.weight": 4, "right.weight": 16}
    assert selection.used == 20
    assert step("left") == {"left.weight": 16, "right.weight": 4}
    assert_unselected_is_base(model, base, selection)


@pytest.mark.parametrize("accumulation", ["candidates", "exact"])
@pytest.mark.parametrize("name", ["static_d3", "id3", "repeat_d3", "kept"])
def test_a_first_micro_batch_without_a_gradient_leaves_the_choice_to_the_next(name, accumulation):
    models = []
    for silent in (0, 2):
        model, selection, optimizer = begin(name, accumulation=accumulation)
        take(model, optimizer, 9)  # slots are in use, so that ``values`` alone do not tell a second window
        for t in (0, 1, 2):
            for part in range(silent):
                masked(model, tokens(20 + part)).backward()
            loss(model, tokens(t)).backward()
            loss(model, tokens(40 + t)).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append((as_lists(selection.indices), snapshot(model)))
    assert models[0][0] == models[1][0]
    assert_same_tensors(models[0][1], models[1][1])


@pytest.mark.parametrize("accumulation", ["candidates", "exact"])
def test_a_micro_batch_that_reaches_slots_alone_leaves_the_choice_to_the_next(accumulation):
    _, _, step = halves(unmask.id3(20, steps=5).but(schedule=fixed(16, 20)), accumulation=accumulation)
    assert step("left") == {"left.weight": 16}
    assert step("left", "right") == {"left.weight": 16, "right.weight": 4}


def fixed(*counts: int) -> unmask.Schedule:
    return unmask.Schedule(lambda t, T, B: counts[min(t, len(counts) - 1)], len(counts))


@pytest.mark.filterwarnings("ignore:step .* was to select:unmask.UnmaskWarning")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_is_behind_its_schedule_resumes_bit_for_bit(name, stop):
    whole, straight, optimizer = begin(name)
    for t in range(5):
        take(whole, optimizer, t, silent=t < 2)
    model, selection, optimizer = begin(name)
    for t in range(stop):
        take(model, optimizer, t, silent=True)
    state = copy.deepcopy(selection.state_dict())
    assert state["used"] == 0
    model, selection, optimizer = begin(name)
    selection.load_state_dict(state)
    for t in range(stop, 5):
        take(model, optimizer, t, silent=t < 2)
    assert as_lists(selection.indices) == as_lists(straight.indices)
    assert_same_tensors(snapshot(model), snapshot(whole))


@pytest.mark.filterwarnings("ignore:step .* was to select:unmask.UnmaskWarning")
def test_ages_count_from_the_step_that_selected():
    model = mixed()
    selection = unmask.select(model, METHODS["id3"]())
    optimizer = unmask.SelectiveAdamW(selection.parameters(), lr=1e-3, bias_correction="entry")
    for t in range(4):
        take(model, optimizer, t, silent=t < 2)
        assert selection.used == (0 if t < 2 else 10 * (t + 1))
    ages = optimizer.state[selection.values]["age"]
    assert ages[:30].tolist() == [2.0] * 30
    assert ages[30:40].tolist() == [1.0] * 10
    assert not ages[40:].any()
    delta = selection.delta(order=True)
    assert len(delta) == 40
    delta.apply(mixed())


@pytest.mark.parametrize("heuristic", ["small_magnitude", "large_magnitude", "constant", "random", "own"])
def test_a_score_that_does_not_come_from_the_gradient_is_ranked_as_before(heuristic, registry):
    if heuristic == "own":
        unmask.register_heuristic("own", lambda w, g: g.abs())
    model = mixed()
    selection = unmask.select(model, unmask.repeat_d3(B).but(heuristic=unmask.heuristic(heuristic)))
    take(model, torch.optim.SGD(selection.parameters(), lr=0.1), 0, silent=True)
    assert selection.used == B


def test_a_dropped_step_says_nothing():
    model, selection, optimizer = begin("id3")
    masked(model, tokens(0)).backward()
    optimizer.zero_grad()  # no step follows
    take(model, optimizer, 0)
    assert selection.used == 10


@pytest.mark.filterwarnings(OLD_NAMES)
def test_an_adapter_waits_for_a_gradient_too():
    model = peft.get_peft_model(mlp(), config(budget=12, total_steps=3, target_modules=None)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    adapter = model.base_model.deltas.adapters["default"]
    for t, x in enumerate(batches(3)):
        (mean_square(model, x) * (0.0 if t == 0 else 1.0)).backward()
        if t == 0:
            with pytest.warns(UnmaskWarning, match="step 0 was to select 4 weights and selected 0"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        assert adapter.used == (0, 8, 12)[t]
    assert len(unmask.peft.delta(model)) == 12


@pytest.mark.filterwarnings("ignore:step .* was to select:unmask.UnmaskWarning")
def test_several_processes_wait_together(tmp_path):
    """No process has a gradient at step 0, and only the second one has one at step 1; all select by that one."""
    cases = [(name, exchange) for name in ("static_d3", "id3", "repeat_d3") for exchange in ("exact", "candidates")]
    first, second = processes.run(2, tmp_path, runs.grid, cases)
    for case, own, other in zip(cases, first, second, strict=True):
        assert own[0] == other[0], case
        assert torch.equal(own[1], other[1]), case
        assert torch.equal(own[2], other[2]), case
        alone = runs.silent_steps(*case)
        assert own[0] == alone[0], case
        assert own[0][0] == 0 < own[0][1], case
        assert torch.equal(own[1], alone[1]), case
        torch.testing.assert_close(own[2], alone[2], rtol=1e-4, atol=1e-6)


# A loss that reaches no tensor of the selection.


@pytest.mark.parametrize("gradients", ["auto", "dense"])
@pytest.mark.parametrize("dense", [None, "right"])
def test_a_batch_that_uses_no_tensor_with_slots_has_a_gradient_of_zero(gradients, dense):
    """A static mask lies in one branch; the other branch is frozen, or trained whole."""
    model, selection, step = halves(unmask.random_mask(5), include="left", dense=dense, gradients=gradients)
    base = snapshot(model)
    step("right")
    assert selection.step == 1
    assert torch.equal(model.left.weight, base["left.weight"])
    assert torch.equal(model.right.weight, base["right.weight"]) == (dense is None)
    step("left", "right")  # accumulated, the sum is the gradient of the first
    moved = (model.left.weight != base["left.weight"]).sum()
    assert moved == 5
    twin, _, other = halves(unmask.random_mask(5), include="left", gradients=gradients)
    other("left")
    assert torch.equal(twin.left.weight, model.left.weight)


def test_a_selecting_step_whose_loss_reaches_no_eligible_tensor_waits():
    _, _, step = halves(unmask.id3(8, steps=2), include="left")
    with pytest.warns(UnmaskWarning, match="step 0 was to select 4"):
        step("right")
    assert step("left") == {"left.weight": 8}


def test_momentum_and_the_schedule_go_on_through_a_batch_that_reaches_nothing():
    model = Halves()
    selection = unmask.select(model, unmask.id3(8, steps=2, stride=1), include="left")
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1, momentum=0.9)
    x = batches(1, width=4)[0]
    seen = []
    for which in ("left", "left", "right", "left"):
        before = model.left.weight.detach().clone()
        model(x, which).backward()
        assert selection.values.grad.any() == (which == "left")
        optimizer.step()
        optimizer.zero_grad()
        seen.append((selection.step, selection.used, int((model.left.weight != before).sum())))
    assert seen == [(1, 4, 4), (2, 8, 8), (3, 8, 8), (4, 8, 8)]


def test_a_forward_that_reaches_a_slot_or_needs_no_graph_is_left_alone():
    model, selection, step = halves(unmask.random_mask(5), include="left")
    x = batches(1, width=4)[0]
    assert "Join" not in type(model(x, "left").grad_fn).__name__
    step("left")
    with torch.no_grad():
        assert model(x, "right").grad_fn is None
    assert model(x, "right").requires_grad
    with torch.inference_mode():
        assert not model(x, "right").requires_grad
    inputs = x.clone().requires_grad_()
    # This asks for the gradient of the inputs only, so the slots have no backward.
    (gradient,) = torch.autograd.grad(model(inputs, "right"), inputs)
    assert gradient.any()
    assert selection.values.grad is None
    selection.release()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    model.requires_grad_(False)
    assert not model(x, "right").requires_grad


def test_copies_and_pickles_of_the_model_know_nothing_of_it(tmp_path):
    model, _, _ = halves(unmask.random_mask(5), include="left")
    x = batches(1, width=4)[0]
    torch.save(model, tmp_path / "model.pt")
    again = unmask.select(copy.deepcopy(model), unmask.pafi(3))
    # One more hook checks the model before a forward (unmask.selection.identity). No hook of the original is left.
    assert (len(again.model._forward_hooks), len(again.model._forward_pre_hooks)) == (1, 2)
    again.release()
    assert not again.model._forward_hooks
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        out = other(x, "right")
        assert not out.requires_grad
        assert torch.equal(out, model(x, "right"))
    assert b"unmask" not in (tmp_path / "model.pt").read_bytes().replace(b"test_zero_gradients", b"")


def test_a_process_whose_loss_reaches_nothing_takes_part(tmp_path):
    first, second = processes.run(2, tmp_path, runs.one_reaches_nothing)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, runs.one_reaches_nothing())


def test_repeat_that_keeps_what_leaves_picks_no_weight_without_a_gradient():
    _, selection, step = halves(unmask.repeat_d3(20, leaving="kept"))
    with pytest.warns(UnmaskWarning, match="selected 16.*No other weight has a gradient until"):
        assert step("left") == {"left.weight": 16}
    assert step("right") == {"left.weight": 16, "right.weight": 16}
    assert {name: flat.numel() for name, flat in selection.picked.items()} == {"right.weight": 16}
    assert selection.used == 32
