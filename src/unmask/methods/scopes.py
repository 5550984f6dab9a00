"""Scopes: which tensor parameters a method may touch. A scope is a frozen value; `resolve` applies it to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from unmask.errors import MethodError
from unmask.gradients.wrappers import named_parameters

Kind = Literal["all", "linear", "bias", "vector", "patterns"]
Patterns = str | Iterable[str] | None

_BIAS = re.compile(r"(^|_)bias(_|$)")  # bias, in_proj_bias, bias_ih_l0; not relative_attention_bias.weight


@dataclass(frozen=True)
class Scope:
    """Which tensor parameters are eligible.

    Attributes:
        kind: ``"all"``; ``"linear"``: weight matrices of linear layers; ``"bias"``: true biases, those of normalisation
            layers included; ``"vector"``: every one-dimensional tensor (what the authors' toolkit calls a bias);
            ``"patterns"``: names in which one of the patterns is found.
        patterns: Regular expressions, searched (not matched from the start) in parameter names.
    """

    kind: Kind = "all"
    patterns: tuple[str, ...] = ()

    def names(self, model: nn.Module) -> list[str]:
        """Names of the eligible tensors of a model, in the order of ``named_parameters()``."""
        parameters = named_parameters(model)
        if self.kind == "all":
            return list(parameters)
        if self.kind == "vector":
            return [name for name, p in parameters.items() if p.ndim == 1]
        if self.kind == "bias":
            return [name for name in parameters if _BIAS.search(name.rpartition(".")[2])]
        if self.kind == "linear":
            weights = {id(weight) for weight in _linear_weights(model)}
            return [name for name, p in parameters.items() if id(p) in weights]
        return matching(parameters, self.patterns, "scope")


def patterns(*expressions: str) -> Scope:
    """A scope of the tensors in whose names one of the regular expressions is found.

    Example:
        >>> attention = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("query", "key", "value")})
        >>> patterns("query", "value").names(attention)
        ['query.weight', 'value.weight']
    """
    return Scope("patterns", expressions)


def _linear_weights(model: nn.Module) -> Iterable[nn.Parameter]:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if is_linear(module) and isinstance(weight, nn.Parameter):
            yield weight


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: transformers' Conv1D is one with a transposed weight."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # the core does not import transformers


def as_patterns(given: Patterns) -> tuple[str, ...]:
    """A pattern, several or none, as a tuple."""
    if given is None:
        return ()
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    for each in found:
        if not isinstance(each, str):
            raise MethodError(f"{each!r:.80} is no pattern; give regular expressions as texts.")
    return found


def exactly(names: Iterable[str]) -> list[str]:
    """Patterns that find these names and no others.

    Example:
        >>> matching(["head.bias", "head_bias"], exactly(["head.bias"]), "dense")
        ['head.bias']
    """
    return [f"^{re.escape(name)}$" for name in names]


def matching(names: Iterable[str], expressions: Iterable[str], what: str) -> list[str]:
    """Names in which one of the regular expressions is found; each expression must find something.

    Args:
        names: Parameter names.
        expressions: Regular expressions.
        what: The argument's name, for the error text.

    Raises:
        MethodError: An expression is invalid or finds nothing.

    Example:
        >>> matching(["a.weight", "a.bias", "b.bias"], [r"bias$"], "include")
        ['a.bias', 'b.bias']
    """
    names = list(names)
    found: set[str] = set()
    for expression in expressions:
        try:
            hits = {name for name in names if re.search(expression, name)}
        except re.error as error:
            raise MethodError(
                f"{what}: {expression!r} is no regular expression ({error}); '.*' stands for anything."
            ) from error
        if not hits:
            some = ", ".join([*names[:3], "...", *names[-2:]]) if len(names) > 5 else ", ".join(names)
            raise MethodError(f"{what}: {expression!r} is found in no parameter name; the names are like {some}.")
        found |= hits
    return [name for name in names if name in found]
