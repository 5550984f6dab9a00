"""Presets: functions that return a `Method` by its name, and `build`, which every front door uses.

``unmask.id3(budget=1000, steps=100)`` is the paper's method; ``.but(...)`` changes a part of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from unmask.errors import MethodError
from unmask.methods.budget import Budget, BudgetLike
from unmask.methods.heuristics import Heuristic, heuristic
from unmask.methods.method import Calibration, Criterion, GradType, Leaving, Method, SampleType, Unselected, check_word
from unmask.methods.schedules import Cumulative, Schedule, uniform
from unmask.methods.scopes import Scope
from unmask.reading import choices

if TYPE_CHECKING:
    from torch import Tensor, nn


def id3(
    budget: BudgetLike,
    steps: int,
    eps: float = 1.0,
    exp: float = 2.0,
    stride: int = 1,
    schedule: str | Cumulative = "uniform",
) -> Method:
    """Builds ID3: it unmasks step by step, by D3 (arXiv 2408.14470, Algorithm 1, which prints theta + eta * grad for a descent).

    Args:
        budget: B, a count or a share of the model's weights.
        steps: T, the planned number of optimizer steps; b(T - 1) = B. Fewer steps leave budget unused; more steps go on with
            the whole budget.
        eps: The number added to |w| in D3. The paper's Table 7a has 1; its Fig. 4a finds 0.5 best.
        exp: The exponent of D3. Table 7a has 2 for NLU and NER, 0 for generation; Fig. 4b finds -1 best.
        stride: Every ``stride``-th step unmasks as much as ``stride`` steps would, and the steps in between nothing.
        schedule: ``"uniform"`` (the paper), ``"cosine"``, ``"front-loaded"``, ``"at-once"``, or a callable b(t, T, B).

    Raises:
        MethodError: A value is not allowed.

    Example:
        >>> id3("0.17%", steps=1_000).schedule.name
        'uniform'
    """
    return Method("id3", Budget.parse(budget), _d3(eps, exp), "increment", Schedule.of(schedule, steps, stride))


def static_d3(budget: BudgetLike, eps: float = 1.0, exp: float = 2.0) -> Method:
    """Builds static-S by D3: it selects all of the budget by the first step's gradient. `id3` describes the arguments."""
    return Method("static_d3", Budget.parse(budget), _d3(eps, exp), "static")


def repeat_d3(
    budget: BudgetLike, eps: float = 1.0, exp: float = 2.0, stride: int = 1, leaving: Leaving = "restored"
) -> Method:
    """Builds repeat-S by D3: it picks the best B of all weights, at their current values, at every ``stride``-th step.

    Args:
        budget: B, a count or a share of the model's weights.
        eps: The number added to |w| in D3; see `id3`.
        exp: The exponent of D3; see `id3`.
        stride: The number of steps from one selection to the next; the B stay the same in between.
        leaving: ``"restored"``: a weight that leaves goes back to its base value, and one that enters starts with fresh
            optimizer state, so that the budget is exact at every step. ``"kept"``: the paper's repeat-S
            (arXiv 2408.14470, Sect. 3 and 6). The B picked have a gradient, it is zero elsewhere (Eq. 3), and nothing goes
            back, so that the weights ever tuned grow past B. It needs the memory of full fine-tuning: ``values``, its gradient
            and the optimizer's state have an entry for every eligible weight.
    """
    schedule = Schedule(uniform, 1, stride)
    return Method("repeat_d3", Budget.parse(budget), _d3(eps, exp), "repeat", schedule, leaving=leaving)


def pafi(budget: BudgetLike) -> Method:
    """Builds PaFi: it selects the B smallest weights by magnitude, before training (arXiv 2305.16742)."""
    return Method("pafi", Budget.parse(budget), heuristic("small_magnitude"), "static")


def fish(
    budget: BudgetLike,
    loader: Iterable[Any],
    num_samples: int = 1024,
    sample_type: SampleType = "label",
    grad_type: GradType = "square",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Method:
    """Builds the Fish mask: it selects the B weights of largest diagonal Fisher information (arXiv 2111.09839).

    ``unmask.select`` makes the estimate before training, in one pass over per-sample gradients. `Calibration` describes the
    arguments.
    """
    calibration = Calibration(loader, num_samples, sample_type, grad_type, loss)
    return Method("fish", Budget.parse(budget), heuristic("fisher"), "static", calibration=calibration)


def bitfit(budget: BudgetLike | None = None, ndim1: bool = False) -> Method:
    """Builds BitFit: it selects the biases (arXiv 2106.10199).

    Args:
        budget: None for all biases; otherwise the first B in the order of tensor names.
        ndim1: True to take every one-dimensional tensor for a bias, as the authors' toolkit does (norm weights too).
    """
    count = None if budget is None else Budget.parse(budget)
    return Method("bitfit", count, heuristic("constant"), "static", scope=Scope("vector" if ndim1 else "bias"))


def random_mask(budget: BudgetLike, seed: int = 0) -> Method:
    """Builds a random mask: it selects B weights, drawn uniformly without replacement by the seed, before training."""
    return Method("random_mask", Budget.parse(budget), heuristic("random", seed=seed), "static")


def sparse_adapter(
    budget: BudgetLike,
    criterion: Criterion = "snip",
    loader: Iterable[Any] = (),
    *,
    pruned: Unselected = "zero",
    num_samples: int = 1024,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> Method:
    """Builds SparseAdapter: it prunes added modules before training and trains the B weights that stay (arXiv 2210.04284).

    Args:
        budget: B, the number or the share of weights that stay.
        criterion: Which weights stay: ``"random"`` ones; those of the largest ``"magnitude"``; by ``"snip"`` the largest
            |w dL/dw|; by ``"grasp"`` the largest w (H dL/dw); by ``"synflow"`` those of the largest synaptic flow, which is
            found in 100 rounds and without data.
        loader: Batches for snip and grasp, as of `Calibration`.
        pruned: ``"zero"`` sets the pruned weights to zero, as published; ``"kept"`` freezes them at their initial values.
        num_samples: The number of examples for snip and grasp.
        loss: ``loss(model, batch) -> scalar``; None for ``model(**batch).loss``.
        seed: The seed of random pruning.

    Raises:
        MethodError: There is no such criterion, or another value is not allowed.
    """
    check_word("criterion", criterion, Criterion)
    # The other criteria are called as their heuristics.
    names = {"magnitude": "large_magnitude", "snip": "initial_snip"}
    by = heuristic("random", seed=seed) if criterion == "random" else heuristic(names.get(criterion, criterion))
    calibration = Calibration(loader, num_samples, loss=loss)
    return Method("sparse_adapter", Budget.parse(budget), by, "static", calibration=calibration, unselected=pruned)


def full() -> Method:
    """Builds full fine-tuning, for comparison: every tensor of the scope is trained as an ordinary dense parameter."""
    return Method("full", None, heuristic("constant"), "static", whole=True)


PRESETS: Mapping[str, Callable[..., Method]] = MappingProxyType(
    {
        preset.__name__: preset
        for preset in (id3, repeat_d3, static_d3, pafi, fish, bitfit, random_mask, sparse_adapter, full)
    }
)
"""Every preset by its name. Front doors know a method only from here."""


def build(name: str, settings: Mapping[str, Any]) -> Method:
    """Builds a preset from settings that may be meant for other presets too.

    Args:
        name: A key of `PRESETS`.
        settings: Values by name. The preset takes those that its signature names. ``allocation`` and ``scope`` (a `Scope` or
            its kind) go with every preset; ``heuristic`` (a `Heuristic` or its name) goes with those that rank by D3, and
            replaces D3 there. A setting of None is left to its default. Every other setting is ignored.

    Raises:
        MethodError: There is no such preset, a setting that it needs is missing, or a setting cannot work.

    Example:
        >>> build("pafi", {"budget": 10, "steps": 100, "eps": 0.5, "scope": "linear"}).scope.kind
        'linear'
        >>> build("static_d3", {"budget": 10, "heuristic": "snip"}).heuristic.name
        'snip'
    """
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise MethodError(f"unknown method {name!r}; there are {choices(name, PRESETS)}.")
    given = {key: value for key, value in settings.items() if value is not None}
    arguments = inspect.signature(preset).parameters
    missing = [key for key, a in arguments.items() if a.default is inspect.Parameter.empty and key not in given]
    if missing:
        raise MethodError(f"method {name!r} needs a value for {', '.join(missing)}.")
    method = preset(**{key: given[key] for key in arguments if key in given})
    changes = {key: given[key] for key in ("allocation", "scope") if key in given}
    if not isinstance(changes.get("scope", Scope()), Scope):
        changes["scope"] = Scope(changes["scope"])
    method = method.but(**changes)
    if "heuristic" in given:
        if method.heuristic.name != "d3":
            ranked = [key for key, each in PRESETS.items() if "exp" in inspect.signature(each).parameters]
            raise MethodError(f"heuristic goes with method {', '.join(ranked)}; method {name!r} has its own.")
        if given["heuristic"] != "d3":  # the preset has bound eps and exp to D3
            seed = {"seed": given["seed"]} if given["heuristic"] == "random" and "seed" in given else {}
            method = method.but(heuristic=heuristic(given["heuristic"], **seed))
    return method


def _d3(eps: float, exp: float) -> Heuristic:
    bound = heuristic("d3", eps=eps, exp=exp)
    if eps < 0 or (eps == 0 and exp > 0):
        raise MethodError(
            f"eps = {eps!r}, exp = {exp!r}; eps must be above 0, or a zero weight divides by zero where exp > 0."
        )
    return bound
