"""Methods: frozen values composed of scope, allocation, heuristic, strategy and schedule.

A preset is a function that returns such a value; `Method.but` gives a changed copy, so any heuristic goes with any
strategy: ``unmask.id3(budget=1000, steps=100).but(heuristic=unmask.heuristic("snip"))``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from unmask.errors import MethodError
from unmask.heuristics import Heuristic, heuristic
from unmask.schedules import Cumulative, Schedule, schedule, uniform
from unmask.scopes import Scope

Budget = int | str
Strategy = Literal["static", "increment", "repeat"]
Allocation = Literal["global", "tensor", "row"]
Unselected = Literal["kept", "zero"]
Criterion = Literal["random", "magnitude", "snip", "grasp", "synflow"]


@dataclass(frozen=True)
class Calibration:
    """What an estimate before training is made from; see `unmask.fish` and `unmask.sparse_adapter`.

    Attributes:
        loader: Iterable of batches (mappings of tensors with ``labels``, or whatever ``loss`` takes).
        num_samples: How many examples to use, the first of the loader.
        sample_type: Of the Fisher information. ``"label"``: gradients at the given labels; ``"expect"``: expectation over
            the model's own output.
        grad_type: Of the Fisher information: ``"square"`` or ``"abs"`` of each example's gradient.
        loss: ``loss(model, batch) -> scalar``, the mean over the batch; None for ``model(**batch).loss``.
    """

    loader: Iterable[Any]
    num_samples: int = 1024
    sample_type: Literal["label", "expect"] = "label"
    grad_type: Literal["square", "abs"] = "square"
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise MethodError(f"num_samples = {self.num_samples}; it must be at least 1.")
        for name, allowed in (("sample_type", ("label", "expect")), ("grad_type", ("square", "abs"))):
            if getattr(self, name) not in allowed:
                raise MethodError(f"{name} = {getattr(self, name)!r}; it must be one of {allowed}.")
        if self.sample_type == "expect" and self.loss is not None:
            raise MethodError("sample_type='expect' takes its loss from the model's logits; leave loss=None.")


@dataclass(frozen=True)
class Method:
    """What is unmasked, and when.

    Attributes:
        name: For reports and the delta's metadata.
        budget: A count, a share of the model's parameters (``"0.17%"``), or None for the whole scope.
        heuristic: Ranks scalar weights.
        strategy: ``"static"`` (all of the budget at the first step), ``"increment"`` (by the schedule, and for good) or
            ``"repeat"`` (the best B anew at every selecting step; weights that leave go back to their base value).
        schedule: b(t); static and repeat select B at step 0, and repeat again every ``schedule.stride`` steps.
        scope: Which tensors are eligible.
        allocation: ``"global"`` as in the paper; ``"tensor"`` or ``"row"``: at most ``ceil(B n / N)`` of a tensor's (an
            output row's) n weights, of N eligible in all.
        calibration: For a heuristic that needs one.
        whole: Train the scope's tensors as ordinary dense parameters (full fine-tuning); there is no budget then.
        unselected: What the scope's other weights do: ``"kept"`` as they are, or pruned to ``"zero"`` at once. Pruning is
            for tensors that the base checkpoint lacks, whose every value travels in the delta.
    """

    name: str
    budget: Budget | None
    heuristic: Heuristic
    strategy: Strategy
    schedule: Schedule = field(default_factory=lambda: Schedule(uniform, 1))
    scope: Scope = field(default_factory=Scope)
    allocation: Allocation = "global"
    calibration: Calibration | None = None
    whole: bool = False
    unselected: Unselected = "kept"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("strategy", ("static", "increment", "repeat")),
            ("allocation", ("global", "tensor", "row")),
            ("unselected", ("kept", "zero")),
        ):
            if getattr(self, name) not in allowed:
                raise MethodError(f"{name} = {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        for name, kind in (("heuristic", Heuristic), ("schedule", Schedule)):
            if not isinstance(getattr(self, name), kind):
                raise MethodError(f"{name} = {getattr(self, name)!r}; build one with unmask.{name}(...).")
        self._check_calibration()
        if self.unselected == "zero" and (
            self.heuristic.needs == "gradient" or self.strategy == "repeat" or self.whole
        ):
            raise MethodError(
                "unselected='zero' prunes before the first step, so the selection must be known then: take a heuristic that "
                "needs no gradient of the step (unmask.sparse_adapter has five), and not strategy='repeat'."
            )
        if self.budget is not None:
            parse_budget(self.budget, None)

    def _check_calibration(self) -> None:
        name = self.heuristic.name
        if self.heuristic.needs != "calibration":
            return
        if self.calibration is None:
            raise MethodError(
                f"the {name} heuristic needs a calibration: unmask.fish or unmask.sparse_adapter brings one."
            )
        if self.strategy == "repeat":
            raise MethodError(
                f"the {name} heuristic is estimated once, before training; strategy='repeat' would need it anew."
            )
        if name == "synflow" and self.allocation != "global":
            raise MethodError("synflow prunes round by round over all tensors together; leave allocation='global'.")

    def but(self, **changes: Any) -> Method:
        """A copy with some fields changed.

        Example:
            >>> pafi(10).but(allocation="row").allocation
            'row'
        """
        return dataclasses.replace(self, **changes)

    def cumulative(self, t: int, budget: int) -> int:
        """b(t), after step t (from 0) has selected; 0 for t < 0."""
        if self.strategy == "increment":
            return self.schedule.cumulative(t, budget)
        return 0 if t < 0 else budget

    def describe(self) -> dict[str, Any]:
        """The method as plain JSON values, for metadata and for comparing a resumed run's method with its own."""
        function = self.schedule.function
        return {
            "name": self.name,
            "heuristic": self.heuristic.name,
            "parameters": dict(self.heuristic.parameters),
            "strategy": self.strategy,
            "schedule": getattr(function, "__name__", type(function).__name__),
            "steps": self.schedule.steps,
            "stride": self.schedule.stride,
            "scope": self.scope.kind,
            "patterns": list(self.scope.patterns),
            "allocation": self.allocation,
        } | ({"unselected": self.unselected} if self.unselected != "kept" else {})


def parse_budget(budget: Budget, total: int | None) -> int:
    """A budget as a count.

    Args:
        budget: A count, or a share such as ``"0.17%"`` (rounded to the nearest count, at least 1).
        total: The model's number of scalar parameters; None only checks the form.

    Raises:
        MethodError: Not a positive count or a share in (0%, 100%].

    Example:
        >>> parse_budget("0.1%", 20_000)
        20
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise MethodError(f"budget = {budget!r}; give a count (320_000) or a share of the parameters ('0.17%').")
    text = str(budget).strip()
    try:
        number = float(text.removesuffix("%")) / 100 if text.endswith("%") else int(text)
    except ValueError:
        number = math.nan
    if isinstance(number, int):
        if number < 1:
            raise MethodError(f"budget = {number}; it must be at least 1.")
        return number
    if not 0 < number <= 1:
        raise MethodError(f"budget = {budget!r}; give a count ('320000') or a share above 0% and up to 100% ('0.17%').")
    return 1 if total is None else max(1, round(number * total))


def id3(
    budget: Budget,
    steps: int,
    eps: float = 1.0,
    exp: float = 2.0,
    stride: int = 1,
    schedule: str | Cumulative = "uniform",
) -> Method:
    """ID3: increment-S selection by D3 (arXiv 2408.14470, Algorithm 1).

    Args:
        budget: B, a count or a share.
        steps: T, the planned number of optimizer steps; b(T - 1) = B. Fewer steps leave budget unused, more are fine.
        eps: Added to |w| in D3; the paper's Table 7a has 1.
        exp: Exponent of D3; Table 7a has 2 for NLU and NER, 0 for generation.
        stride: Unmask ``stride`` steps' worth every ``stride``-th step, and nothing in between.
        schedule: ``"uniform"`` (the paper), ``"cosine"``, ``"front-loaded"``, or a callable b(t, T, B).
    """
    return Method("id3", budget, _d3(eps, exp), "increment", _schedule(schedule, steps, stride))


def static_d3(budget: Budget, eps: float = 1.0, exp: float = 2.0) -> Method:
    """Static-S selection by D3: all of the budget from the first step's gradient."""
    return Method("static_d3", budget, _d3(eps, exp), "static")


def repeat_d3(budget: Budget, eps: float = 1.0, exp: float = 2.0, stride: int = 1) -> Method:
    """Repeat-S selection by D3: the best B anew at every ``stride``-th step.

    The budget is exact at every step: a weight that leaves the selection goes back to its base value, and one that
    enters starts with fresh optimizer state.
    """
    return Method("repeat_d3", budget, _d3(eps, exp), "repeat", _schedule(uniform, 1, stride))


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


def _d3(eps: float, exp: float) -> Heuristic:
    if not (eps >= 0 and math.isfinite(eps) and math.isfinite(exp)) or (eps == 0 and exp > 0):
        raise MethodError(
            f"eps = {eps}, exp = {exp}; eps must be above 0, or a zero weight divides by zero where exp > 0."
        )
    return heuristic("d3", eps=eps, exp=exp)


def _schedule(which: str | Cumulative, steps: int, stride: int) -> Schedule:
    return schedule(which, steps, stride)
