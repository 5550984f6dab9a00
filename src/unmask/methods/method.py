"""A method: a frozen value composed of scope, allocation, heuristic, strategy and schedule.

The presets of `unmask.methods.presets` return such values; `Method.but` gives a changed copy, so any heuristic goes with any
strategy: ``unmask.id3(budget=1000, steps=100).but(heuristic=unmask.heuristic("snip"))``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from unmask.errors import MethodError
from unmask.methods.budget import Budget
from unmask.methods.heuristics import Heuristic
from unmask.methods.schedules import Schedule, uniform
from unmask.methods.scopes import Scope
from unmask.reading import choices

if TYPE_CHECKING:
    from torch import Tensor, nn

# The words that options take, each in one place. Configurations, the command line and the PEFT adapter derive theirs from here.
Strategy = Literal["static", "increment", "repeat"]
Allocation = Literal["global", "tensor", "row", "column"]
Unselected = Literal["kept", "zero"]
Leaving = Literal["restored", "kept"]
Criterion = Literal["random", "magnitude", "snip", "grasp", "synflow"]
SampleType = Literal["label", "expect"]
GradType = Literal["square", "abs"]
Accumulation = Literal["candidates", "exact"]
Gradients = Literal["auto", "sampled", "dense"]
Exchange = Literal["exact", "candidates", "none"]
ClipScope = Literal["selected", "all"]
BiasCorrection = Literal["global", "entry"]
Inside = Literal["lora", "dora", "shira", "pfeiffer", "houlsby"]


def check_word(name: str, value: Any, words: Any) -> None:
    """Refuses, with a MethodError, a value of the option ``name`` that is not one of its words, a ``Literal``'s.

    Example:
        >>> check_word("leaving", "kept", Leaving)
    """
    if value not in get_args(words):
        raise MethodError(f"{name} = {value!r}; it must be one of {choices(value, get_args(words))}.")


@dataclass(frozen=True)
class Calibration:
    """The data that an estimate before training is made from; `unmask.fish` and `unmask.sparse_adapter` take them.

    Attributes:
        loader: An iterable of batches: mappings of tensors with ``labels``, or any values that ``loss`` takes.
        num_samples: The number of examples to use, from the start of the loader.
        sample_type: How the Fisher information is estimated. ``"label"`` takes gradients at the given labels; ``"expect"``
            takes the expectation over the model's own output.
        grad_type: What the Fisher information sums: the ``"square"`` or the ``"abs"`` of each example's gradient.
        loss: ``loss(model, batch) -> scalar``, the mean over the batch; None for ``model(**batch).loss``.

    Raises:
        MethodError: A value is not allowed.
    """

    loader: Iterable[Any]
    num_samples: int = 1024
    sample_type: SampleType = "label"
    grad_type: GradType = "square"
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise MethodError(f"num_samples = {self.num_samples}; it must be at least 1.")
        check_word("sample_type", self.sample_type, SampleType)
        check_word("grad_type", self.grad_type, GradType)
        if self.sample_type == "expect" and self.loss is not None:
            raise MethodError("sample_type='expect' takes its loss from the model's logits; leave loss=None.")


@dataclass(frozen=True)
class Method:
    """A frozen value that says which weights are unmasked, and when.

    Attributes:
        name: The name that reports and the delta's metadata show.
        budget: The budget B; None for the whole scope. `but` and the presets take a count or a share (``"0.17%"``) as well.
        heuristic: The heuristic that ranks scalar weights.
        strategy: ``"static"`` unmasks all of the budget at the first step. ``"increment"`` unmasks by the schedule, and for
            good. ``"repeat"`` takes the best B of all weights at every selecting step; see ``leaving``.
        schedule: The schedule b(t). Static and repeat select B at step 0, and repeat again every ``schedule.stride`` steps.
        scope: The scope, which says which tensors are eligible.
        allocation: ``"global"`` ranks all weights together, as in the paper. ``"tensor"``, ``"row"`` and ``"column"`` take at
            most ``ceil(B n / N)`` of the n weights of a tensor (of an output row, of an input column), where N weights are
            eligible in all. A vector is one row, and one column.
        calibration: The data for a heuristic that needs a calibration; None for the others.
        whole: True to train the scope's tensors as ordinary dense parameters (full fine-tuning); there is no budget then.
        unselected: What happens to the scope's other weights: they are ``"kept"`` as they are, or set to ``"zero"`` at once.
            Zero is for tensors that the base checkpoint lacks; the delta carries all their values.
        leaving: What happens under ``"repeat"`` to a weight that is no longer among the B. It is ``"restored"`` to its base
            value, so that the budget is exact. Or it is ``"kept"``, as in the paper: its gradient is zero from then on, the
            optimizer's momentum may still move it, and the number of weights ever tuned grows past B.

    Raises:
        MethodError: A part is not allowed, or two parts do not go together.

    Example:
        >>> import unmask
        >>> unmask.id3(budget=6, steps=100, stride=2)
        id3(budget=6, heuristic=d3, parameters={'eps': 1.0, 'exp': 2.0}, strategy=increment, schedule=uniform, steps=100, \
stride=2, scope=all, allocation=global)
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
        words = (("strategy", Strategy), ("allocation", Allocation), ("unselected", Unselected), ("leaving", Leaving))
        for name, allowed in words:
            check_word(name, getattr(self, name), allowed)
        for name, kind, how in (
            ("heuristic", Heuristic, "unmask.heuristic('d3')"),
            ("schedule", Schedule, "unmask.Schedule.of('uniform', steps=1000)"),
            ("scope", Scope, "unmask.Scope('linear')"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise MethodError(f"{name} = {getattr(self, name)!r}; build one, for example with {how}.")
        if self.budget is not None:
            object.__setattr__(self, "budget", Budget.parse(self.budget))
        name = self.heuristic.name
        if self.heuristic.needs == "calibration":
            if self.calibration is None:
                raise MethodError(
                    f"the {name} heuristic needs a calibration: unmask.fish or unmask.sparse_adapter brings one."
                )
            if self.strategy == "repeat":
                raise MethodError(
                    f"the {name} heuristic is estimated once, before training; strategy='repeat' would need it again at "
                    "each step."
                )
            if name == "synflow" and self.allocation != "global":
                raise MethodError("synflow prunes round by round over all tensors together; leave allocation='global'.")
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

    def but(self, **changes: Any) -> Method:
        """Returns a copy with some attributes changed.

        Example:
            >>> import unmask
            >>> unmask.pafi(10).but(allocation="row").allocation
            'row'
        """
        return dataclasses.replace(self, **changes)

    def cumulative(self, t: int, budget: int) -> int:
        """Returns b(t), the number of weights unmasked after step t (from 0) has selected; 0 for t < 0."""
        if self.strategy == "increment":
            return self.schedule.cumulative(t, budget)
        return 0 if t < 0 else budget

    @property
    def by_entry(self) -> bool:
        """True if an entry's rank depends on its own weight and gradient alone."""
        alone = self.allocation == "global" and self.heuristic.elementwise
        return alone and self.heuristic.needs == "gradient"

    def describe(self) -> dict[str, Any]:
        """Returns the method as plain JSON values, for metadata and to compare a resumed run's method with the running one."""
        return {
            "name": self.name,
            "heuristic": self.heuristic.name,
            "parameters": dict(self.heuristic.parameters),
            "strategy": self.strategy,
            "schedule": self.schedule.name,
            "steps": self.schedule.steps,
            "stride": self.schedule.stride,
            "scope": self.scope.kind,
            "patterns": list(self.scope.expressions),
            "allocation": self.allocation,
        } | {
            # Metadata and states of earlier versions lack these, so the values that they had then are left out.
            name: value
            for name, value, usual in (("unselected", self.unselected, "kept"), ("leaving", self.leaving, "restored"))
            if value != usual
        }

    def __repr__(self) -> str:
        parts = {"budget": self.budget, **self.describe()}
        name = parts.pop("name")
        return f"{name}({', '.join(f'{key}={value}' for key, value in parts.items() if value not in (None, {}, []))})"
