"""Finds the tensors of a base that an adapter may change, under the names that they have without PEFT's wrappers."""

from __future__ import annotations

import copy

from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from unmask.errors import MethodError
from unmask.gradients.wrappers import named_parameters, persistent_buffers
from unmask.methods.method import Method
from unmask.peft.config import SelectiveConfig
from unmask.quantised.sources import sources
from unmask.selection.refusals import refuse_renormalized

_ORIGINAL = "original_module"


class Base:
    """A base model's own tensors, under their names in its checkpoint.

    PEFT replaces each of ``modules_to_save`` with a wrapper. The wrapper holds the base's module under another name, and one
    copy of it for each adapter; the copies are not part of the base.

    Attributes:
        parameters: The base's parameters by name.
        buffers: The base's persistent buffers by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._wrappers = [name for name, each in model.named_modules() if isinstance(each, AuxiliaryTrainingWrapper)]
        parameters, buffers = named_parameters(model).items(), persistent_buffers(model).items()
        self.parameters = {own: each for name, each in parameters if (own := self.name_of(name)) is not None}
        self.buffers = {own: each for name, each in buffers if (own := self.name_of(name)) is not None}

    def name_of(self, name: str) -> str | None:
        """Returns the base's own name of a tensor or a module; None if it does not belong to the base."""
        for wrapper in self._wrappers:
            if name.startswith(f"{wrapper}."):
                inside = name.removeprefix(f"{wrapper}.")
                if inside != _ORIGINAL and not inside.startswith(f"{_ORIGINAL}."):
                    return None
                return (wrapper + inside.removeprefix(_ORIGINAL)).removesuffix(".")
        return name

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters and the persistent buffers by name."""
        return {**self.parameters, **self.buffers}


def saved_whole(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Returns the tensors that an adapter trains whole (its copies of ``modules_to_save``), under the base's names."""
    whole: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in getattr(module, "modules_to_save", {}):
            state = module.modules_to_save[adapter].state_dict(keep_vars=True)
            whole |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    return whole


def eligible(model: nn.Module, config: SelectiveConfig, method: Method) -> dict[str, nn.Parameter]:
    """Returns the parameters in which an adapter may select weights, sorted by the base's names.

    The function replaces ``"all-linear"`` in the configuration by the names of the linear layers. The method's scope narrows
    the choice (``bitfit``).

    Raises:
        MethodError: A tensor is quantised, nothing is left, or ``exclude_modules`` excludes nothing.
    """
    base = Base(model)
    _maybe_include_all_linear_layers(config, model)
    if isinstance(config.target_modules, set):
        config.target_modules = sorted({own for name in config.target_modules if (own := base.name_of(name))})
    refuse_renormalized(model, ())
    rules = copy.copy(config)
    if config.target_modules is None:
        rules.target_modules = ".*"  # PEFT's matcher matches nothing if there is no target; here that means everything
    inside: set[int] = set()  # ids of parameters, since tied weights have several names
    outside: set[int] = set()
    for name, module in model.named_modules():
        own = base.name_of(name)
        if own is None or (not own and config.target_modules is not None):
            continue
        result = check_target_module_exists(rules, own)
        if isinstance(result, _ExcludedModule):
            outside.update(map(id, module.parameters()))
        elif result:
            inside.update(map(id, module.parameters()))
    parameters = named_parameters(model)
    scope = {id(parameters[name]) for name in method.scope.names(model)}
    wanted = (inside & scope) - outside
    quantised = [name for name in sources(model) if name in parameters and id(parameters[name]) in wanted]
    if quantised:
        raise MethodError(
            f"{quantised[0]!r} is quantised, and a SelectiveConfig cannot train it. Use unmask.select(model, ...), which puts a "
            "sidecar next to it (docs/quantised.md), or leave it out of target_modules."
        )
    chosen = {
        name: parameter
        for name, parameter in sorted(base.parameters.items())
        if id(parameter) in wanted and parameter.is_floating_point() and parameter.numel()
    }
    names = [name for name, _ in model.named_modules() if name]
    examples = ", ".join([*names[:3], "...", *names[-2:]] if len(names) > 5 else names) or "(none)"
    if not chosen:
        raise MethodError(
            f"target_modules = {config.target_modules!r}, exclude_modules = {config.exclude_modules!r} and modules_to_save = "
            f"{config.modules_to_save!r} leave no tensor of the base for {method.name!r}; the base's modules are like "
            f"{examples}."
        )
    if config.exclude_modules and not outside:
        raise MethodError(
            f"exclude_modules = {config.exclude_modules!r} excludes nothing; modules are like {examples}."
        )
    return chosen
