"""A method: a frozen value composed of scope, allocation, heuristic, strategy and schedule.

The presets of `unmask.methods.presets` return such values; `Method.but` gives a changed copy, so any heuristic goes with any
strategy: ``unmask.id3(budget=1000, steps=100).but(heuristic=unmask.heuristic("snip"))``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from torch import Tensor, nn

from unmask.errors import MethodError
from unmask.methods.heuristics import Heuristic
from unmask.methods.schedules import Schedule, uniform
from unmask.methods.scopes import Scope

Budget = int | str
Strategy = Literal["static", "increment", "repeat"]
Allocation = Literal["global", "tensor", "row", "column"]
Unselected = Literal["kept", "zero"]
Leaving = Literal["restored", "kept"]


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
            ``"repeat"`` (the best B of all at every selecting step; see ``leaving``).
        schedule: b(t); static and repeat select B at step 0, and repeat again every ``schedule.stride`` steps.
        scope: Which tensors are eligible.
        allocation: ``"global"`` as in the paper; ``"tensor"``, ``"row"`` or ``"column"``: at most ``ceil(B n / N)`` of a
            tensor's (an output row's, an input column's) n weights, of N eligible in all; a vector is one row, and one column.
        calibration: For a heuristic that needs one.
        whole: Train the scope's tensors as ordinary dense parameters (full fine-tuning); there is no budget then.
        unselected: What the scope's other weights do: ``"kept"`` as they are, or pruned to ``"zero"`` at once. Pruning is
            for tensors that the base checkpoint lacks, whose every value travels in the delta.
        leaving: What becomes of a weight that is no longer among the B, under ``"repeat"``: it is ``"restored"`` to its base
            value, so that the budget is exact; or it is ``"kept"``, as in the paper: its gradient is zero from then on, the
            optimizer's momentum may still move it, and the number of weights ever tuned grows past B.
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
    leaving: Leaving = "restored"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("strategy", ("static", "increment", "repeat")),
            ("allocation", ("global", "tensor", "row", "column")),
            ("unselected", ("kept", "zero")),
            ("leaving", ("restored", "kept")),
        ):
            if getattr(self, name) not in allowed:
                raise MethodError(f"{name} = {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        for name, kind in (("heuristic", Heuristic), ("schedule", Schedule)):
            if not isinstance(getattr(self, name), kind):
                raise MethodError(f"{name} = {getattr(self, name)!r}; build one with unmask.{name}(...).")
        self._check_calibration()
        if self.leaving == "kept" and self.strategy != "repeat":
            raise MethodError(
                f"leaving = 'kept' is for strategy='repeat'; under strategy={self.strategy!r} leave leaving='restored'. "
                "unmask.repeat_d3(..., leaving='kept') builds one that works."
            )
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
            >>> import unmask
            >>> unmask.pafi(10).but(allocation="row").allocation
            'row'
        """
        return dataclasses.replace(self, **changes)

    def cumulative(self, t: int, budget: int) -> int:
        """b(t), after step t (from 0) has selected; 0 for t < 0."""
        if self.strategy == "increment":
            return self.schedule.cumulative(t, budget)
        return 0 if t < 0 else budget

    @property
    def by_entry(self) -> bool:
        """Whether an entry's rank depends on its own weight and gradient alone."""
        alone = self.allocation == "global" and self.heuristic.elementwise
        return alone and self.heuristic.needs == "gradient"

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
        } | {name: value for name, value, usual in self._later_parts() if value != usual}

    def _later_parts(self) -> list[tuple[str, Any, Any]]:
        """Parts that earlier versions lacked, and their values then: left out of old metadata and states."""
        return [
            ("unselected", self.unselected, "kept"),
            ("leaving", self.leaving, "restored"),
        ]


def parse_budget(budget: Budget, total: int | None, eligible: int | None = None) -> int:
    """Turns a budget into a count.

    Args:
        budget: A count (``320_000``, ``"320K"``), or a share: ``"0.17%"``, or the ratio of two counts, ``"320K of 184M"``,
            which is how a budget that was set on one model is carried over to another. A share is of the model's weights;
            with ``" of eligible"`` or ``" eligible"`` at its end (``"4% of eligible"``, ``"320K of 1.33M eligible"``) it is
            of those that the method may select among: inside a LoRA, of the LoRA's. It is rounded to the nearest count, at
            least 1.
        total: The model's number of scalar parameters; None checks the form alone.
        eligible: How many of them are eligible; None where that is not known.

    Raises:
        MethodError: The budget is not a positive count or a share in (0%, 100%], or it is a share of the eligible weights
            where these are not known.

    Example:
        >>> parse_budget("0.1%", 20_000), parse_budget("103K of 184M", 22_700_000), parse_budget("4% of eligible", 900, 500)
        (20, 12707, 20)
    """
    text = "" if isinstance(budget, bool) or not isinstance(budget, (int, str)) else str(budget)
    form = _BUDGET.fullmatch(text) if len(text) < 100 else None
    if form is None:
        raise MethodError(f"budget = {budget!r}; give {_BUDGETS}.")
    number, other = _number(form["number"], form["unit"]), _number(form["of"] or "1", form["of_unit"])
    if form["unit"] != "%" and not form["of"]:
        if form["eligible"] or number.denominator != 1 or number < 1:
            raise MethodError(f"budget = {text}; a count must be a whole number, at least 1.")
        return int(number)
    if not other or not 0 < number / other <= 1:
        raise MethodError(f"budget = {text!r}; a share must be above 0% and at most 100%.")
    whole = eligible if form["eligible"] else total
    if whole is None and total is not None:
        raise MethodError(
            f"budget = {budget!r} is a share of the eligible weights, whose number is not known here; give a count or a "
            "share of the model's weights."
        )
    return 1 if whole is None else max(1, round(number / other * whole))


def _number(digits: str, unit: str | None) -> Fraction:
    """The number in front of a unit, exactly."""
    return Fraction(digits.replace("_", "")) * _UNITS[(unit or "").upper()]


_UNITS = {"": Fraction(1), "%": Fraction(1, 100), "K": Fraction(1_000), "M": Fraction(10**6), "B": Fraction(10**9)}
_BUDGETS = "a count (320_000, '320K') or a share of the parameters ('0.17%', '320K of 184M', '4% of eligible')"
_DIGITS = r"\d+(?:_\d+)*(?:\.\d+)?"
_BUDGET = re.compile(
    rf"\s*(?P<number>[+-]?{_DIGITS})\s*(?P<unit>[%KMBkmb])?(?:\s+of\s+(?P<of>{_DIGITS})\s*(?P<of_unit>[KMBkmb])?)?"
    r"(?P<eligible>\s+(?:of\s+)?eligible)?\s*"
)
