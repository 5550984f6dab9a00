"""Applies a scope and the user's patterns to a model: finds the tensors that may be selected from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from unmask.errors import MethodError
from unmask.gradients.wrappers import named_parameters
from unmask.methods.scopes import Patterns, Scope, as_patterns, matching
from unmask.quantised.sources import Unsupported, sources


def resolve(
    model: nn.Module, scope: Scope, include: Patterns, exclude: Patterns, dense: Patterns
) -> tuple[list[str], list[str]]:
    """Applies a scope and the patterns of ``unmask.select`` to a model.

    Args:
        model: Any module.
        scope: The method's scope.
        include: Keep only names in which one of these is found.
        exclude: Drop names in which one of these is found.
        dense: Names of tensors that are trained whole, outside the budget; they win over the scope.

    Returns:
        Names of the eligible tensors and of the dense ones, each sorted; of tensors that are not float, only quantised
        weights are eligible.

    Raises:
        MethodError: A pattern finds nothing, no tensor is left, or a tensor is quantised in a way that nothing can be
            selected from.
    """
    parameters = named_parameters(model)
    if not parameters:
        raise MethodError("the model has no parameters; there is nothing to select from.")
    dense_names = matching(parameters, as_patterns(dense), "dense")
    quantised = sources(model)
    frozen = [name for name in dense_names if name in quantised or not parameters[name].is_floating_point()]
    if frozen and frozen[0] in quantised:
        raise MethodError(
            f"dense: {frozen[0]!r} is quantised and cannot be trained whole; leave it to the budget, or keep it out of the "
            "quantisation (transformers: llm_int8_skip_modules=[...] or modules_to_not_convert=[...])."
        )
    if frozen:
        raise MethodError(
            f"dense: {frozen[0]!r} is {parameters[frozen[0]].dtype}, which has no gradient; leave it out."
        )
    names = set(scope.names(model)) - set(dense_names)
    if include is not None:
        names &= set(matching(parameters, as_patterns(include), "include"))
    names -= set(matching(parameters, as_patterns(exclude), "exclude"))
    for name in sorted(names):
        kind = quantised.get(name)
        if isinstance(kind, Unsupported):
            raise MethodError(f"{name!r} {kind.reason}.")
    usable = {name for name in names if name in quantised or parameters[name].is_floating_point()}
    eligible = sorted(name for name in usable if parameters[name].numel())
    if not eligible and not dense_names:
        raise MethodError(
            f"no tensor is left: scope {scope.kind!r} with include={include!r}, exclude={exclude!r} is empty."
        )
    return eligible, sorted(dense_names)


def refuse_renormalized(model: nn.Module, dense: Iterable[str]) -> None:
    """Refuses embeddings with ``max_norm``: every forward rewrites rows of theirs, whatever is selected.

    Args:
        model: Any module.
        dense: Names of tensors that are trained, and stored, whole; for these it does no harm.

    Raises:
        MethodError: There is such an embedding.
    """
    parameters = named_parameters(model)
    whole = {id(parameters[name]) for name in dense}
    for name, module in model.named_modules():
        bounded = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
        if bounded and id(module.weight) not in whole:
            raise MethodError(
                f"{name or 'the model'} has max_norm = {module.max_norm}, so every forward rewrites weights that are not "
                "selected; set its max_norm to None, or train it whole with dense=."
            )
