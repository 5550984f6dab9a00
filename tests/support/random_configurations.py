"""Runs random compositions of methods, options and optimizers: each is refused clearly or keeps every promise."""

from __future__ import annotations

import copy
import random
import warnings

import torch
from nets import loss, mixed, tokens
from torch import Tensor, nn

import unmask
from unmask import UnmaskError, UnmaskWarning

STEPS = 4
HEURISTICS = ("d3", "gradient", "snip", "small_magnitude", "large_magnitude", "random", "constant")


def run_case(seed: int) -> str:
    """Builds, selects and trains one random configuration; ``"refused"`` or ``"kept"``.

    Raises:
        AssertionError: A promise was broken: the budget, the base's other weights, what another delta sets, the delta, or the
            resumed run.
    """
    draw = random.Random(seed)
    dtype = draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    model = mixed(dtype)
    base = copy.deepcopy(model)
    try:
        method, options, optimizer = _drawn(draw)
        options["avoid"] = _other_task(draw, base)
        selection = unmask.select(model, method, **options)
        moments = optimizer(selection.parameters())
        _trained(model, selection, moments, draw, range(STEPS // 2))
        state, kept = copy.deepcopy(selection.state_dict()), copy.deepcopy(moments.state_dict())
        _trained(model, selection, moments, random.Random(seed + 1), range(STEPS // 2, STEPS))
    except UnmaskError:
        return "refused"
    _assert_invariants(selection, model, base, method, options["avoid"])
    _assert_resumes(selection, model, base, (method, options, optimizer), (state, kept), random.Random(seed + 1))
    return "kept"


def _drawn(draw: random.Random) -> tuple[unmask.Method, dict, object]:
    budget = draw.choice((1, 7, 40, 200, 5000, "3%", "10% of eligible", "1K of 30K"))
    eps, exp = draw.choice((0.0, 0.1, 1.0, 5.0)), draw.choice((-2.0, -1.0, 0.0, 1.0, 2.0))
    stride = draw.choice((1, 1, 2, 3))
    built = {
        "id3": lambda: unmask.id3(budget, STEPS, eps, exp, stride, draw.choice(("uniform", "cosine", "front-loaded"))),
        "repeat": lambda: unmask.repeat_d3(budget, eps, exp, stride, draw.choice(("restored", "kept"))),
        "static": lambda: unmask.static_d3(budget, eps, exp),
        "pafi": lambda: unmask.pafi(budget),
        "bitfit": lambda: unmask.bitfit(draw.choice((None, budget))),
        "random": lambda: unmask.random_mask(budget, draw.randrange(9)),
        "full": unmask.full,
    }
    method = draw.choice(list(built.values()))()
    changes = {
        "heuristic": lambda: unmask.heuristic(draw.choice(HEURISTICS)),
        "allocation": lambda: draw.choice(("global", "tensor", "row", "column")),
        "strategy": lambda: draw.choice(("static", "increment", "repeat")),
        "scope": lambda: unmask.Scope(draw.choice(("all", "linear", "bias", "vector"))),
    }
    for name in draw.sample(list(changes), draw.choice((0, 0, 1, 2))):
        method = method.but(**{name: changes[name]()})
    options = {
        "include": draw.choice((None, None, "up|down", "embed")),
        "exclude": draw.choice((None, None, "norm")),
        "dense": draw.choice((None, None, "conv")),
        "accumulation": draw.choice(("candidates", "exact")),
        "gradients": draw.choice(("auto", "sampled", "dense")),
        "clip_scope": draw.choice(("selected", "selected", "all")),
    }
    rate = draw.choice((1e-3, 1e-2))
    optimizers = (
        lambda p: torch.optim.SGD(p, rate, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, rate, weight_decay=0.1),
        lambda p: unmask.SelectiveAdamW(p, rate, weight_decay=0.1),
        lambda p: unmask.SelectiveAdamW(p, rate, bias_correction="entry"),
        lambda p: torch.optim.Adagrad(p, rate),
    )
    return method, options, draw.choice(optimizers)


def _other_task(draw: random.Random, base: nn.Module) -> unmask.SparseDelta | None:
    """Returns the delta of another task, which was not trained, or none."""
    method = draw.choice((None, None, unmask.random_mask(300), unmask.pafi("60%"), unmask.bitfit(30)))
    if method is None:
        return None
    selection = unmask.select(copy.deepcopy(base), method)
    delta = selection.delta()
    selection.release()
    return delta


def _trained(model: nn.Module, selection: unmask.Selection, optimizer, draw: random.Random, steps: range) -> None:
    for step in steps:
        for micro in range(draw.choice((1, 1, 2))):
            loss(model, tokens(10 * step + micro)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnmaskWarning)
            optimizer.step()
        optimizer.zero_grad()


def _assert_invariants(
    selection: unmask.Selection,
    model: nn.Module,
    base: nn.Module,
    method: unmask.Method,
    other: unmask.SparseDelta | None,
) -> None:
    held, dense = selection.indices, {d.name for d in selection.dense}
    count = sum(flat.numel() for flat in held.values())
    assert count == selection.used
    if not method.whole and method.leaving != "kept":
        assert count <= method.cumulative(selection.step - 1, selection.budget)
    for name, before in base.named_parameters():
        touched = torch.zeros(before.numel(), dtype=torch.bool)
        touched[held.get(name, torch.empty(0, dtype=torch.int64))] = True
        now: Tensor = model.get_parameter(name).detach().reshape(-1)
        assert name in dense or torch.equal(now[~touched], before.detach().reshape(-1)[~touched]), name
    if other is not None:
        for name in held.keys() & other.sparse.keys():
            assert not torch.isin(held[name], other.sparse[name].indices).any(), name
    fresh = copy.deepcopy(base)
    selection.delta().apply(fresh)
    for (name, tuned), applied in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(tuned, applied), name


def _assert_resumes(selection, model, base, run, saved, draw: random.Random) -> None:
    (method, options, optimizer), (state, kept) = run, saved
    again = copy.deepcopy(base)
    resumed = unmask.select(again, method, **options)
    moments = optimizer(resumed.parameters())
    resumed.load_state_dict(state)
    moments.load_state_dict(kept)
    _trained(again, resumed, moments, draw, range(STEPS // 2, STEPS))
    for (name, one), other in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other[1]), name
    assert resumed.used == selection.used
