"""The methods by name: presets, functions that return a `Method`.

``unmask.id3(budget=1000, steps=100)`` is the paper's; ``.but(...)`` changes a part of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from unmask.errors import MethodError
from unmask.methods.heuristics import Heuristic, heuristic
from unmask.methods.method import Budget, Calibration, Leaving, Method, Unselected, parse_budget
from unmask.methods.schedules import Cumulative, uniform
from unmask.methods.schedules import schedule as _schedule
from unmask.methods.scopes import Scope

__all__ = [
    "PRESETS",
    "Calibration",
    "Method",
    "bitfit",
    "build",
    "fish",
    "full",
    "id3",
    "pafi",
    "parse_budget",
    "random_mask",
    "repeat_d3",
    "sparse_adapter",
    "static_d3",
]

Criterion = Literal["random", "magnitude", "snip", "grasp", "synflow"]


def id3(
    budget: Budget,
    steps: int,
    eps: float = 1.0,
    exp: float = 2.0,
    stride: int = 1,
    schedule: str | Cumulative = "uniform",
) -> Method:
    """ID3: increment-S selection by D3 (arXiv 2408.14470, Algorithm 1, which prints theta + eta * grad for a descent).

    Args:
        budget: B, a count or a share.
        steps: T, the planned number of optimizer steps; b(T - 1) = B. Fewer steps leave budget unused, more are fine.
        eps: Added to |w| in D3; the paper's Table 7a has 1, its Fig. 4a finds 0.5 best.
        exp: Exponent of D3; Table 7a has 2 for NLU and NER, 0 for generation; Fig. 4b finds -1 best.
        stride: Unmask ``stride`` steps' worth every ``stride``-th step, and nothing in between.
        schedule: ``"uniform"`` (the paper), ``"cosine"``, ``"front-loaded"``, or a callable b(t, T, B).
    """
    return Method("id3", budget, _d3(eps, exp), "increment", _schedule(schedule, steps, stride))


def static_d3(budget: Budget, eps: float = 1.0, exp: float = 2.0) -> Method:
    """Static-S selection by D3: all of the budget from the first step's gradient."""
    return Method("static_d3", budget, _d3(eps, exp), "static")


def repeat_d3(
    budget: Budget, eps: float = 1.0, exp: float = 2.0, stride: int = 1, leaving: Leaving = "restored"
) -> Method:
    """Builds repeat-S by D3: it picks the best B of all weights, at their current values, at every ``stride``-th step.

    Args:
        budget: B, a count or a share.
        eps: Of D3.
        exp: Of D3.
        stride: Steps from one selection to the next; the B stay the same in between.
        leaving: ``"restored"``: a weight that leaves goes back to its base value, and one that enters starts with fresh
            optimizer state, so that the budget is exact at every step. ``"kept"``: the paper's repeat-S
            (arXiv 2408.14470, Sect. 3 and 6). The B picked have a gradient, it is zero elsewhere (Eq. 3), and nothing goes
            back, so that the weights ever tuned grow past B. Needs the memory of full fine-tuning: ``values``, its gradient
            and the optimizer's state have an entry for every eligible weight.
    """
    return Method("repeat_d3", budget, _d3(eps, exp), "repeat", _schedule(uniform, 1, stride), leaving=leaving)


def pafi(budget: Budget) -> Method:
    """PaFi: the B smallest weights by magnitude, static (arXiv 2305.16742)."""
    return Method("pafi", budget, heuristic("magnitude"), "static")


def fish(
    budget: Budget,
    loader: Iterable[Any],
    num_samples: int = 1024,
    sample_type: Literal["label", "expect"] = "label",
    grad_type: Literal["square", "abs"] = "square",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Method:
    """Fish mask: the B weights of largest diagonal Fisher information, static (arXiv 2111.09839).

    The estimate runs inside ``unmask.select``, in one pass over per-sample gradients; see `Calibration` for arguments.
    """
    calibration = Calibration(loader, num_samples, sample_type, grad_type, loss)
    return Method("fish", budget, heuristic("fisher"), "static", calibration=calibration)


def bitfit(budget: Budget | None = None, ndim1: bool = False) -> Method:
    """BitFit: the biases (arXiv 2106.10199).

    Args:
        budget: None for all of them; otherwise the first B in the order of tensor names.
        ndim1: Take every one-dimensional tensor for a bias, as the authors' toolkit does (norm weights too).
    """
    return Method("bitfit", budget, heuristic("constant"), "static", scope=Scope("vector" if ndim1 else "bias"))


def random_mask(budget: Budget, seed: int = 0) -> Method:
    """B weights drawn uniformly without replacement, static."""
    return Method("random_mask", budget, heuristic("random", seed=seed), "static")


def sparse_adapter(
    budget: Budget,
    criterion: Criterion = "snip",
    loader: Iterable[Any] = (),
    *,
    pruned: Unselected = "zero",
    num_samples: int = 1024,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> Method:
    """SparseAdapter: prunes added modules at their initialisation and trains the B weights that stay (arXiv 2210.04284).

    Args:
        budget: B, the weights that stay.
        criterion: What stays: ``"random"``; ``"magnitude"``, the largest; ``"snip"``, the largest |w dL/dw|; ``"grasp"``,
            the largest w (H dL/dw); ``"synflow"``, the largest synaptic flow, in 100 rounds and without data.
        loader: Batches for snip and grasp; see `Calibration`.
        pruned: ``"zero"`` as published, or ``"kept"``: what is pruned stays, frozen, at its initial value.
        num_samples: Examples for snip and grasp.
        loss: ``loss(model, batch) -> scalar``; None for ``model(**batch).loss``.
        seed: For random pruning.
    """
    heuristics = {
        "random": heuristic("random", seed=seed),
        "magnitude": heuristic("large_magnitude"),
        "snip": heuristic("initial_snip"),
    } | {name: heuristic(name) for name in ("grasp", "synflow")}
    if criterion not in heuristics:
        raise MethodError(f"criterion = {criterion!r}; it must be one of {', '.join(heuristics)}.")
    calibration = Calibration(loader, num_samples, loss=loss)
    return Method("sparse_adapter", budget, heuristics[criterion], "static", calibration=calibration, unselected=pruned)


def full() -> Method:
    """Full fine-tuning, for comparison: every tensor of the scope is trained as an ordinary dense parameter."""
    return Method("full", None, heuristic("constant"), "static", whole=True)


PRESETS: Mapping[str, Callable[..., Method]] = {
    preset.__name__: preset
    for preset in (id3, repeat_d3, static_d3, pafi, fish, bitfit, random_mask, sparse_adapter, full)
}


def build(name: str, settings: Mapping[str, Any]) -> Method:
    """Builds a preset from settings that may be meant for other presets too.

    Args:
        name: One of `PRESETS`.
        settings: Arguments by name. The preset takes those that its signature names; a setting of None is left to the
            preset's own default, and every other setting is ignored.

    Raises:
        MethodError: There is no such preset, a setting that it needs is missing, or a setting cannot work.

    Example:
        >>> build("pafi", {"budget": 10, "steps": 100, "eps": 0.5}).name
        'pafi'
    """
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise MethodError(f"unknown method {name!r}; there are {', '.join(PRESETS)}.")
    arguments = inspect.signature(preset).parameters
    taken = {key: settings[key] for key in arguments if settings.get(key) is not None}
    missing = [key for key, a in arguments.items() if a.default is inspect.Parameter.empty and key not in taken]
    if missing:
        raise MethodError(f"method {name!r} needs a value for {', '.join(missing)}.")
    return preset(**taken)


def _d3(eps: float, exp: float) -> Heuristic:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (eps, exp))
    if not numbers or not (eps >= 0 and math.isfinite(eps) and math.isfinite(exp)) or (eps == 0 and exp > 0):
        raise MethodError(
            f"eps = {eps!r:.80}, exp = {exp!r:.80}; both must be finite numbers, and eps above 0, or a zero weight divides by "
            "zero where exp > 0."
        )
    return heuristic("d3", eps=eps, exp=exp)
