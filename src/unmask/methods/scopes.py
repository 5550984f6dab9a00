"""Scopes: which tensor parameters a method may select from. A scope is a frozen value; `Scope.names` applies it to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from unmask.errors import MethodError
from unmask.reading import choices

if TYPE_CHECKING:
    from torch import nn

NamedKind = Literal["all", "linear", "bias", "vector"]
"""The kinds of scope that need no patterns."""
Kind = Literal[NamedKind, "patterns"]
Patterns = str | Iterable[str] | None

_BIAS = re.compile(r"(^|_)bias(_|$)")  # bias, in_proj_bias, bias_ih_l0; not relative_attention_bias.weight


@dataclass(frozen=True)
class Scope:
    """The rule that says which tensor parameters are eligible.

    Attributes:
        kind: ``"all"``; ``"linear"``: weight matrices of linear layers but the output embedding's, which are the layers that
            peft's ``"all-linear"`` takes; ``"bias"``: true biases, those of normalisation layers included; ``"vector"``: every
            one-dimensional tensor (what the authors' toolkit calls a bias); ``"patterns"``: names in which one of the patterns
            is found.
        expressions: Regular expressions for ``"patterns"``. They are searched (not matched from the start) in parameter names.

    Raises:
        MethodError: There is no such kind, or the expressions do not go with it.
    """

    kind: Kind = "all"
    expressions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise MethodError(f"scope = {self.kind!r:.80}; it must be one of {choices(self.kind, get_args(Kind))}.")
        if (self.kind == "patterns") != bool(self.expressions):
            raise MethodError(
                f"scope = {self.kind!r} with expressions = {self.expressions!r:.80}; build a scope of regular expressions with "
                "unmask.Scope.patterns('query', 'value')."
            )

    @classmethod
    def patterns(cls, *expressions: str) -> Scope:
        """Builds a scope of the tensors in whose names one of the regular expressions is found.

        Example:
            >>> from torch import nn
            >>> attention = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("query", "key", "value")})
            >>> Scope.patterns("query", "value").names(attention)
            ['query.weight', 'value.weight']
        """
        return cls("patterns", expressions)

    def names(self, model: nn.Module) -> list[str]:
        """Returns the names of the eligible tensors of a model, in the order of ``named_parameters()``.

        Raises:
            MethodError: An expression is invalid, or it finds no tensor.
        """
        from unmask.gradients.wrappers import named_parameters  # it imports torch

        parameters = named_parameters(model)
        if self.kind == "all":
            return list(parameters)
        if self.kind == "vector":
            return [name for name, p in parameters.items() if p.ndim == 1]
        if self.kind == "bias":
            return [name for name in parameters if _BIAS.search(name.rpartition(".")[2])]
        if self.kind == "linear":
            weights = {id(getattr(module, "weight", None)) for module in model.modules() if is_linear(module)}
            weights -= _vocabulary_weights(model)
            return [name for name, p in parameters.items() if id(p) in weights]
        return matching(parameters, self.expressions, "scope")


def is_linear(module: nn.Module) -> bool:
    """Returns True for a linear layer. The Conv1D of transformers counts too: it is one with a transposed weight."""
    from torch import nn

    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # the core does not import transformers


def _vocabulary_weights(model: nn.Module) -> set[int]:
    """Returns the ids of the weights of output embeddings, and of all embeddings that a linear layer may be tied to."""
    from torch import nn

    found: set[int] = set()
    for module in model.modules():
        outputs = getattr(module, "get_output_embeddings", None)  # of transformers' models; it gives a layer or None
        found.add(id(getattr(outputs() if callable(outputs) else None, "weight", None)))
        if isinstance(module, nn.Embedding):
            found.add(id(module.weight))
    return found


def as_patterns(given: Patterns) -> tuple[str, ...]:
    """Returns one pattern, several or none as a tuple.

    Raises:
        MethodError: One of them is not a text.
    """
    if given is None:
        return ()
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    for each in found:
        if not isinstance(each, str):
            raise MethodError(f"{each!r:.80} is not a pattern; give regular expressions as texts.")
    return found


def exactly(names: Iterable[str]) -> list[str]:
    """Returns patterns that find these names and no others.

    Example:
        >>> matching(["head.bias", "head_bias"], exactly(["head.bias"]), "dense")
        ['head.bias']
    """
    return [f"^{re.escape(name)}$" for name in names]


def matching(names: Iterable[str], expressions: Iterable[str], what: str) -> list[str]:
    """Returns the names in which one of the regular expressions is found. Each expression must find at least one.

    Args:
        names: The names of parameters.
        expressions: The regular expressions.
        what: The argument's name. The error text begins with it.

    Raises:
        MethodError: An expression is invalid, or it finds nothing.

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
                f"{what}: {expression!r} is not a regular expression ({error}); '.*' stands for any text."
            ) from error
        if not hits:
            some = ", ".join([*names[:3], "...", *names[-2:]]) if len(names) > 5 else ", ".join(names)
            raise MethodError(f"{what}: {expression!r} is found in no parameter name; the names are like {some}.")
        found |= hits
    return [name for name in names if name in found]
