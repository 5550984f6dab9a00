"""Which tensors of a base an adapter may touch, and what they are called whatever PEFT has wrapped."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor, nn

from peft import PeftConfig
from unmask.errors import MethodError
from unmask.gradients.wrappers import named_parameters, persistent_buffers
from unmask.methods.method import Method
from unmask.peft.config import SelectiveConfig
from unmask.peft.private import (
    AuxiliaryTrainingWrapper,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from unmask.quantised.sources import sources
from unmask.selection.refusals import refuse_renormalized

_ORIGINAL = "original_module"


class Base:
    """A base model's own tensors, under their names in its checkpoint.

    PEFT puts a wrapper with copies in the place of each of ``modules_to_save``: the base's tensors are then inside it under
    another name, and the copies are no part of the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self._wrappers = [
            name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        self.parameters: dict[str, nn.Parameter] = self._own(named_parameters(model))
        self.buffers: dict[str, Tensor] = self._own(persistent_buffers(model))

    def name_of(self, name: str) -> str | None:
        """The base's own name of a tensor or module; None for what is not the base's."""
        for wrapper in self._wrappers:
            if name.startswith(f"{wrapper}."):
                inside = name.removeprefix(f"{wrapper}.")
                if inside != _ORIGINAL and not inside.startswith(f"{_ORIGINAL}."):
                    return None
                return (wrapper + inside.removeprefix(_ORIGINAL)).removesuffix(".")
        return name

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers."""
        return {**self.parameters, **self.buffers}

    def _own(self, named: dict) -> dict:
        names = {name: self.name_of(name) for name in named}
        return {own: named[name] for name, own in names.items() if own is not None}


def saved_whole(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors that an adapter trains whole (its copies of ``modules_to_save``), by the base's names of them."""
    whole: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in getattr(module, "modules_to_save", {}):
            state = module.modules_to_save[adapter].state_dict(keep_vars=True)
            whole |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    return whole


def eligible(model: nn.Module, config: SelectiveConfig, method: Method) -> dict[str, nn.Parameter]:
    """The parameters that an adapter's budget may go to, by the base's names, sorted.

    Args:
        model: The base.
        config: Its ``target_modules`` and the like; ``"all-linear"`` is replaced by the names it stands for.
        method: Its scope narrows the choice (``bitfit``).

    Raises:
        MethodError: A tensor is quantised, nothing is left, or ``exclude_modules`` excludes nothing.
    """
    base = Base(model)
    _maybe_include_all_linear_layers(config, model)
    if isinstance(config.target_modules, set):
        config.target_modules = sorted({own for name in config.target_modules if (own := base.name_of(name))})
    refuse_renormalized(model, ())
    targets, excluded = _matched(model, base, config)
    inside, outside = _below(model, base, targets), _below(model, base, excluded)
    parameters = named_parameters(model)
    scope = {id(parameters[name]) for name in method.scope.names(model)}
    wanted = (inside & scope) - outside
    _refuse_quantised(model, wanted)
    chosen = {
        name: parameter
        for name, parameter in sorted(base.parameters.items())
        if id(parameter) in wanted and parameter.is_floating_point() and parameter.numel()
    }
    if not chosen:
        raise MethodError(
            f"target_modules = {config.target_modules!r}, exclude_modules = {config.exclude_modules!r} and modules_to_save = "
            f"{config.modules_to_save!r} leave no tensor of the base for {method.name!r}; the base's modules are like "
            f"{_some(model)}."
        )
    if config.exclude_modules and not outside:
        raise MethodError(
            f"exclude_modules = {config.exclude_modules!r} excludes nothing; modules are like {_some(model)}."
        )
    return chosen


def _refuse_quantised(model: nn.Module, wanted: set[int]) -> None:
    """An adapter's values are in the base's own tensors, where a quantised matrix has no place for them."""
    parameters = named_parameters(model)
    quantised = [name for name in sources(model) if name in parameters and id(parameters[name]) in wanted]
    if quantised:
        raise MethodError(
            f"{quantised[0]!r} is quantised, and a SelectiveConfig cannot train it. Use unmask.select(model, ...), which puts a "
            "sidecar beside it (docs/quantised.md), or leave it out of target_modules."
        )


def _matched(model: nn.Module, base: Base, config: SelectiveConfig) -> tuple[set[str], set[str]]:
    """Names of the base's modules that are targeted, and of those that are excluded."""
    # PEFT's matcher takes no target for none; here none is the whole model
    wanted: PeftConfig | SimpleNamespace = config
    if config.target_modules is None:
        wanted = SimpleNamespace(**{**vars(config), "target_modules": ".*"})
    targets: set[str] = set()
    excluded: set[str] = set()
    for name, _ in model.named_modules():
        own = base.name_of(name)
        if own is None or (not own and config.target_modules is not None):
            continue
        result = check_target_module_exists(wanted, own)
        if isinstance(result, _ExcludedModule):
            excluded.add(own)
        elif result:
            targets.add(own)
    return targets, excluded


def _below(model: nn.Module, base: Base, modules: set[str]) -> set[int]:
    """Ids of the parameters of these modules and of all inside them, under any of their names (tied weights have two)."""
    found = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = base.name_of(name)
        if own is not None and any(owner in modules for owner in _owners(own)):
            found.add(id(parameter))
    return found


def _owners(name: str) -> list[str]:
    """Names of the modules that hold a parameter, the innermost last.

    Example:
        >>> _owners("a.b.weight")
        ['', 'a', 'a.b']
    """
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _some(model: nn.Module) -> str:
    names = [name for name, _ in model.named_modules() if name]
    return ", ".join([*names[:3], "...", *names[-2:]] if len(names) > 5 else names) or "(none)"
