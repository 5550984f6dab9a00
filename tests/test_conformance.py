"""Compares every method, in float32 and bfloat16, with the plain dense reference: same selection and values for 50 steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from nets import loss, mixed, tokens
from reference import DenseReference
from torch import Tensor, nn

import unmask
from unmask.methods.method import Method

STEPS, BUDGET = 50, 100
ADAMW = {"lr": 3e-3, "weight_decay": 0.1}


def d3(exp: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda w, g: g.abs() / (w.abs() + 1.0) ** exp


def uniform(t: int) -> int:
    return min(BUDGET, BUDGET * (t + 1) // STEPS)


def all_at_once(t: int) -> int:
    return BUDGET


def stride_10(t: int) -> int:
    return min(STEPS, (t // 10 + 1) * 10) * BUDGET // STEPS


def cubic(t: int) -> int:
    return BUDGET if t >= STEPS - 1 else int(BUDGET * (1 - (1 - (t + 1) / STEPS) ** 3) + 1e-9)


def fisher_scores(model: nn.Module) -> Tensor:
    """Returns the diagonal Fisher information by dense gradients of one example at a time."""
    total: dict[str, Tensor] = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for row in tokens(1000, 16):
        loss(model, row[None]).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.float().square()
            p.grad = None
    return torch.cat([total[name].reshape(-1) for name in sorted(total)]) / 16


def fish() -> Method:
    return unmask.fish(BUDGET, [(tokens(1000, 16)[:6],), (tokens(1000, 16)[6:],)], loss=lambda m, b: loss(m, b[0]))


@dataclass(frozen=True)
class Case:
    method: Method
    score: Callable[[Tensor, Tensor], Tensor] | Callable[[nn.Module], Tensor]
    cumulative: Callable[[int], int] = all_at_once
    repeat: int = 0
    kept: bool = False
    given: bool = False  # score(model) gives fixed scores


CASES = {
    "id3": Case(unmask.id3(BUDGET, STEPS), d3(2), uniform),
    "id3-generation": Case(unmask.id3(BUDGET, STEPS, exp=0.0), lambda w, g: g.abs(), uniform),
    "id3-exp-1": Case(unmask.id3(BUDGET, STEPS, eps=0.5, exp=-1.0), lambda w, g: g.abs() * (w.abs() + 0.5), uniform),
    "id3-stride": Case(unmask.id3(BUDGET, STEPS, stride=10), d3(2), stride_10),
    "id3-front-loaded": Case(unmask.id3(BUDGET, STEPS, schedule="front-loaded"), d3(2), cubic),
    "static_d3": Case(unmask.static_d3(BUDGET), d3(2)),
    "repeat_d3": Case(unmask.repeat_d3(BUDGET), d3(2), repeat=1),
    "repeat_d3-stride": Case(unmask.repeat_d3(BUDGET, stride=7), d3(2), repeat=7),
    "repeat_d3-kept": Case(unmask.repeat_d3(BUDGET, leaving="kept"), d3(2), repeat=1, kept=True),
    "repeat_d3-kept-stride": Case(unmask.repeat_d3(BUDGET, stride=7, leaving="kept"), d3(2), repeat=7, kept=True),
    "pafi": Case(unmask.pafi(BUDGET), lambda w, g: -w.abs()),
    "pafi-increment": Case(
        unmask.pafi(BUDGET).but(strategy="increment", schedule=unmask.Schedule.of("uniform", STEPS)),
        lambda w, g: -w.abs(),
        uniform,
    ),
    "snip-increment": Case(
        unmask.id3(BUDGET, STEPS).but(heuristic=unmask.heuristic("snip")), lambda w, g: (w * g).abs(), uniform
    ),
    "fish": Case(fish(), fisher_scores, given=True),
}


def assert_equals_reference(
    model: nn.Module, twin: nn.Module, method: Method, reference: DenseReference, steps: int = STEPS
) -> None:
    """Steps both together and asserts that model, loss and mask equal the reference's, bit for bit."""
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    selection = unmask.select(model, method, gradients="dense")
    optimizer = torch.optim.AdamW(selection.parameters(), **ADAMW)
    for t in range(steps):
        value = loss(model, tokens(t))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert value.item() == reference.step(lambda m, t=t: loss(m, tokens(t)))
        assert selection.used == int(reference.mask.sum())
        assert torch.equal(mask_of(selection, model), reference.mask)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
        untouched = torch.ones(p.numel(), dtype=torch.bool)
        untouched[selection.indices.get(name, torch.empty(0, dtype=torch.int64))] = False
        assert torch.equal(p.detach().reshape(-1)[untouched], base[name].reshape(-1)[untouched]), name
    held = torch.nonzero(reference.mask).squeeze(1)
    positions = selection.state_dict()["positions"][: selection.used]
    assert torch.equal(
        selection.values.detach()[: selection.used][positions.argsort()], reference.master.detach()[held]
    )


def mask_of_fish(scores: Tensor, method: Method) -> Tensor:
    """Returns the mask that Fish selects in bfloat16, and asserts that only a few entries near the cut-off differ.

    A bfloat16 sum over a batch differs in its last bits from a sum over examples.
    """
    probe = mixed(torch.bfloat16)
    made = mask_of(unmask.select(probe, method), probe)
    best = torch.zeros_like(made)
    best[scores.argsort(descending=True, stable=True)[:BUDGET]] = True
    assert int((made & best).sum()) >= 0.95 * BUDGET
    assert scores[made].min() >= 0.9 * scores[best].min()
    return made.float()


def mask_of(selection: unmask.Selection, model: nn.Module) -> Tensor:
    parameters = dict(model.named_parameters())
    masks = []
    for name in sorted(parameters):
        mask = torch.zeros(parameters[name].numel(), dtype=torch.bool)
        mask[selection.indices.get(name, torch.empty(0, dtype=torch.int64))] = True
        masks.append(mask)
    return torch.cat(masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_method_equals_the_dense_reference(name: str, dtype: torch.dtype) -> None:
    case, model, twin = CASES[name], mixed(dtype), mixed(dtype)
    score = case.score(mixed(dtype)) if case.given else case.score  # type: ignore[call-arg]
    if case.given and dtype == torch.bfloat16:
        score = mask_of_fish(score, case.method)
    names = [n for n, _ in twin.named_parameters()]
    reference = DenseReference(twin, names, score, case.cumulative, BUDGET, case.repeat, case.kept, **ADAMW)
    assert_equals_reference(model, twin, case.method, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [None, 30], ids=["all", "30"])
def test_bitfit_equals_training_the_biases(budget: int | None, dtype: torch.dtype) -> None:
    model, twin = mixed(dtype), mixed(dtype)
    biases = [n for n, _ in twin.named_parameters() if n.endswith("bias")]
    count = budget or sum(twin.get_parameter(n).numel() for n in biases)
    everything = torch.cat([torch.full((p.numel(),), float(n in biases)) for n, p in sorted(twin.named_parameters())])
    reference = DenseReference(
        twin, [n for n, _ in twin.named_parameters()], everything, lambda t: count, count, **ADAMW
    )
    assert_equals_reference(model, twin, unmask.bitfit(budget), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_random_mask_trains_as_the_dense_reference_with_that_mask(dtype: torch.dtype) -> None:
    model, twin, method = mixed(dtype), mixed(dtype), unmask.random_mask(BUDGET, seed=3)
    probe = mixed(dtype)
    drawn = mask_of(unmask.select(probe, method), probe).float()
    assert drawn.sum() == BUDGET
    names = [n for n, _ in twin.named_parameters()]
    assert_equals_reference(model, twin, method, DenseReference(twin, names, drawn, all_at_once, BUDGET, **ADAMW))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_full_equals_ordinary_fine_tuning_with_float32_masters(dtype: torch.dtype) -> None:
    model, twin = mixed(dtype), mixed(dtype)
    names = [n for n, _ in twin.named_parameters()]
    total = sum(p.numel() for p in twin.parameters())
    reference = DenseReference(twin, names, lambda w, g: g.abs(), lambda t: total, total, **ADAMW)
    selection = unmask.select(model, unmask.full())
    optimizer = torch.optim.AdamW(selection.parameters(), **ADAMW)
    for t in range(STEPS):
        value = loss(model, tokens(t))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert value.item() == pytest.approx(reference.step(lambda m, t=t: loss(m, tokens(t))), rel=1e-6)
    assert selection.used == selection.budget == total
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5 if dtype == torch.float32 else 0, atol=1e-6)


def test_uniform_schedule_sums_to_half_of_the_static_updates() -> None:
    """Counts a run with ties: where T divides B, the sum of |Lambda_t| is B (T + 1) / 2 (the paper's theorem)."""
    model = mixed(torch.bfloat16)
    selection = unmask.select(model, unmask.id3(BUDGET, STEPS))
    optimizer, total = torch.optim.AdamW(selection.parameters(), lr=1e-3), 0
    for t in range(STEPS):
        loss(model, tokens(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        count = sum(flat.numel() for flat in selection.indices.values())
        assert count == BUDGET * (t + 1) // STEPS
        total += count
    assert total == BUDGET * (STEPS + 1) // 2
