"""Applies a scope and the user's patterns to a model: finds the tensors that may be selected from, and counts the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from unmask.delta.base import added_tensors, missing_from_checkpoint
from unmask.errors import MethodError
from unmask.gradients.wrappers import named_parameters, persistent_buffers
from unmask.methods.method import Method
from unmask.methods.scopes import Patterns, as_patterns, matching
from unmask.quantised.layers import weights
from unmask.quantised.sources import Unsupported, sources
from unmask.selection.avoid import Avoided, avoided_by


@dataclass(frozen=True)
class ModelFacts:
    """The facts that a selection has to know of a model. `facts_of` computes it once, before anything is changed.

    Attributes:
        model: The plain model.
        eligible: Names of the tensors that may be selected from, sorted. `unmask.full` has none.
        dense: Names of the tensors that are trained whole, outside the budget, sorted.
        quantised: Names of the quantised weights.
        sharded: True if ``fully_shard`` has spread the model over processes.
        budget: B, as a count; for `unmask.full` the number of weights it trains.
        named_new: Names of the tensors that the user calls new; None if the checkpoint has to tell.
        flags: Every parameter's ``requires_grad``, by name.
        buffers: Copies of the persistent buffers, by name.
        avoided: The weights that ``avoid=`` keeps from being selected. Tensors that it keeps out whole are not eligible.
    """

    model: nn.Module
    eligible: list[str]
    dense: list[str]
    quantised: frozenset[str]
    sharded: bool
    budget: int
    named_new: list[str] | None
    flags: Mapping[str, bool]
    buffers: Mapping[str, Tensor]
    avoided: Avoided

    @cached_property
    def absent(self) -> set[str]:
        """The names of the tensors that the base checkpoint lacks, as the user or the checkpoint says."""
        return missing_from_checkpoint(self.model) if self.named_new is None else set(self.named_new)

    @property
    def trained(self) -> list[str]:
        """The names of all tensors that are trained, in part or whole."""
        return [*self.eligible, *self.dense]

    def new(self) -> set[str]:
        """Returns the names of the tensors that no base has: those of `absent`, and those that a PEFT library added."""
        return self.absent | added_tensors(self.model)


def facts_of(
    model: nn.Module,
    method: Method,
    include: Patterns,
    exclude: Patterns,
    dense: Patterns,
    new: Patterns,
    avoid: Any,
    sharded: bool,
) -> ModelFacts:
    """Computes the facts of a model for a method; the arguments are those of ``unmask.select``.

    What ``dense`` finds is trained whole, outside the budget; it wins over the scope. Of the tensors that are not float, only
    quantised weights are eligible.

    Raises:
        MethodError: A pattern finds nothing, nothing is eligible, or less than the budget is. Or a tensor is quantised in a way
            that nothing can be selected from, or a delta to avoid does not fit the model.
    """
    parameters = named_parameters(model)
    if not parameters:
        raise MethodError("the model has no parameters; there is nothing to select from.")
    whole = sorted(matching(parameters, as_patterns(dense), "dense"))
    quantised = sources(model)
    for name in whole:
        if name in quantised:
            raise MethodError(
                f"dense: {name!r} is quantised and cannot be trained whole; leave it to the budget, or keep it out of the "
                "quantisation (transformers: llm_int8_skip_modules=[...] or modules_to_not_convert=[...])."
            )
        if not parameters[name].is_floating_point():
            raise MethodError(f"dense: {name!r} is {parameters[name].dtype}, which has no gradient; leave it out.")
    names = set(method.scope.names(model)) - set(whole)
    if include is not None:
        names &= set(matching(parameters, as_patterns(include), "include"))
    names -= set(matching(parameters, as_patterns(exclude), "exclude"))
    for name in sorted(names):
        kind = quantised.get(name)
        if isinstance(kind, Unsupported):
            raise MethodError(f"{name!r} {kind.reason}.")
    avoided = avoided_by(avoid, model)
    usable = {name for name in names if name in quantised or parameters[name].is_floating_point()}
    if not method.whole:
        usable -= avoided.whole
    eligible = sorted(name for name in usable if parameters[name].numel())
    if not eligible and not whole:
        others = " without the tensors that the deltas to avoid store whole" if names & avoided.whole else ""
        raise MethodError(
            f"no tensor is left: scope {method.scope.kind!r} with include={include!r}, exclude={exclude!r} is empty{others}."
        )
    if method.whole:
        eligible, whole = [], sorted({*eligible, *whole})
    return ModelFacts(
        model,
        eligible,
        whole,
        frozenset(quantised),
        sharded,
        count_budget(model, method, whole if method.whole else eligible, avoided),
        None if new is None else matching(parameters, as_patterns(new), "new"),
        {name: parameter.requires_grad for name, parameter in parameters.items()},
        {name: buffer.detach().clone() for name, buffer in persistent_buffers(model).items()},
        avoided,
    )


def count_budget(model: nn.Module, method: Method, eligible: list[str], avoided: Avoided | None = None) -> int:
    """Returns B: a method's budget among a model's eligible tensors, as a count. Weights to avoid are not eligible.

    Raises:
        MethodError: Nothing is eligible, or less than the budget.
    """
    parameters = weights(model)
    available = sum(parameters[name].numel() for name in eligible)
    if method.whole:
        return available
    taken = 0 if avoided is None else avoided.count(eligible)
    available -= taken
    if not eligible:
        raise MethodError(
            f"scope {method.scope.kind!r} and the patterns leave no tensor for the budget; unmask.full() with include= trains "
            "dense tensors alone."
        )
    without = f" without the {taken:,} that the deltas to avoid set" if taken else ""
    if not available:
        raise MethodError(f"no weight is left for the budget{without}; widen the scope, or avoid fewer deltas.")
    if method.budget is None:
        return available
    budget = method.budget.of(sum(p.numel() for p in parameters.values()), available)
    if budget > available:
        raise MethodError(
            f"budget = {method.budget} asks for {budget:,} weights, but only {available:,} are eligible under scope "
            f"{method.scope.kind!r} and the patterns{without}; lower the budget or widen the scope."
        )
    return budget
