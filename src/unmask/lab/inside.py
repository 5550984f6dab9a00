"""Adds a LoRA or bottleneck adapters to a base model, for a run that selects its budget inside them.

peft adds LoRA, DoRA and SHiRA; the `adapters` library adds bottleneck adapters. The delta's metadata hold the kind and its
settings, so that a fresh process can add the same modules before it applies the delta.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from unmask.delta.base import added_tensors, checkpoint_name
from unmask.delta.delta import SparseDelta
from unmask.errors import ConfigError, DeltaError, MissingExtraError, need
from unmask.methods.method import Inside
from unmask.methods.naming import layer_of
from unmask.methods.scopes import is_linear

Kind = Inside
KINDS: tuple[Kind, ...] = get_args(Kind)
NAME = "unmask"
"""The name of the adapter in the `adapters` library. The name of a LoRA is peft's "default"."""
_BOTTLENECKS = {"pfeiffer": "seq_bn", "houlsby": "double_seq_bn"}  # the names in the `adapters` library since version 3


@dataclass(frozen=True)
class Into:
    """The modules that are added to a base, and their settings.

    Attributes:
        kind: The kind: ``"lora"``, ``"dora"`` or ``"shira"`` (peft), ``"pfeiffer"`` or ``"houlsby"`` (bottleneck adapters of
            the `adapters` library).
        r: The rank of the LoRA. SHiRA has r (in + out) weights of a layer.
        alpha: The LoRA's scale is alpha / r.
        dropout: The dropout on the LoRA's input.
        targets: The names of the modules that get a LoRA; ``("all-linear",)`` for all linear ones, ``("layer-linear",)`` for
            those inside the numbered transformer layers, () for peft's own choice.
        reduction: The width of the bottleneck is the hidden size divided by this.
        seed: The seed of SHiRA's random places. peft draws the same places for all layers of a shape.
    """

    kind: Kind
    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    reduction: float = 16.0
    seed: int = 0

    @property
    def is_lora(self) -> bool:
        """True if peft adds the modules, and False if `adapters` does."""
        return self.kind not in _BOTTLENECKS

    def describe(self) -> dict[str, Any]:
        """Returns the settings that the kind uses, as JSON values; `into_of` reads them."""
        settings = asdict(self) | {"targets": list(self.targets)}
        lora = ("kind", "r", "alpha", "dropout", "targets")
        keys = {"shira": ("kind", "r", "targets", "seed"), "lora": lora, "dora": lora}.get(
            self.kind, ("kind", "reduction")
        )
        return {key: settings[key] for key in keys}


@dataclass(frozen=True)
class Inserted:
    """A base with added modules.

    Attributes:
        model: The model to train.
        added: The names of the added parameters without the head's copies. The budget is selected in them.
        head: The names of the parameters that the base checkpoint lacked, as they are trained now.
        new: The names of all tensors that the base checkpoint lacks.
    """

    model: Any
    added: list[str]
    head: list[str]
    new: list[str]


def into_of(delta: SparseDelta) -> Into | None:
    """Reads from a delta's metadata which modules it was trained inside; None for the base itself.

    Raises:
        DeltaError: This version of unmask cannot add the modules, or the metadata are damaged.
    """
    described = delta.provenance.into
    if described is None:
        return None
    if described.get("kind") not in KINDS:
        raise DeltaError(f"the delta was trained inside {described!r}; this unmask can add {', '.join(KINDS)}.")
    return Into(**{**described, "targets": tuple(described.get("targets", ()))})


def require(into: Into) -> None:
    """Checks that this environment can add the modules.

    Raises:
        MissingExtraError: The library that adds them is not installed.
    """
    if into.is_lora:
        need("peft", "hf")
    elif not _has_adapters():
        raise MissingExtraError(
            f"'adapters' is not installed, and {into.kind} adapters come from it: pip install 'unmask[adapters]', in a "
            "separate environment, because adapters 1.3 pins transformers 4.57 and cannot share one with transformers 5."
        )


def insert(model: Any, into: Into, missing: Collection[str], seed: int) -> Inserted:
    """Adds a LoRA or adapters to a base model, in place.

    ``missing`` names the tensors that the base checkpoint lacks (a new head). The seed is that of the modules' random init.

    Raises:
        MissingExtraError: The library that adds them is not installed.
        ConfigError: The library cannot add them to this model.
    """
    require(into)
    torch.manual_seed(seed)
    with _quiet():
        try:
            if into.is_lora:
                tuned = _with_lora(model, into, missing)
            else:
                adapters, tuned = need("adapters", "adapters"), model
                adapters.init(tuned)
                config = adapters.AdapterConfig.load(_BOTTLENECKS[into.kind], reduction_factor=into.reduction)
                tuned.add_adapter(NAME, config=config)
                tuned.set_active_adapters(NAME)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ConfigError(
                f"{into.kind} cannot be added to this {type(model).__name__}: {error}"
                + (" Name the modules with lora_targets, or take lora_targets=all-linear." if into.is_lora else "")
            ) from error
    names, everything = dict(tuned.named_parameters()), added_tensors(tuned)
    # The trained copy of a head is called X.modules_to_save.default.weight where the base has X.weight.
    copies = {name for name in everything if ".modules_to_save." in name}
    lacking = {name for name in tuned.state_dict() if checkpoint_name(name) in missing}
    originals = {name: re.sub(r"\.modules_to_save\.[^.]+", "", checkpoint_name(name)) for name in copies}
    head = {name for name, original in originals.items() if original in missing} if into.is_lora else lacking
    return Inserted(
        tuned,
        added=[name for name in names if name in everything - copies],
        head=[name for name in names if name in head],
        new=[name for name in names if name in everything | lacking],
    )


def save_adapter(model: Any, into: Into, folder: Path) -> None:
    """Writes the trained modules and the head as an ordinary folder of their library.

    ``PeftModel.from_pretrained(base, folder)`` loads that of a LoRA, and ``model.load_adapter(folder)`` of the `adapters`
    library that of bottleneck adapters.
    """
    with _quiet():
        if into.is_lora:
            model.save_pretrained(str(folder))
        else:
            model.save_adapter(str(folder), NAME, with_head=True, use_safetensors=True)


def merged(model: Any, into: Into) -> Any:
    """Multiplies a LoRA into the base's weights, and returns the model. It is equal up to rounding.

    Raises:
        ConfigError: Bottleneck adapters cannot be merged.
    """
    if not into.is_lora:
        raise ConfigError(
            f"{into.kind} adapters have a non-linearity and cannot be merged into the base's weights; write them as an ordinary "
            "adapter folder with --adapter."
        )
    with _quiet():
        return model.merge_and_unload()


def _with_lora(model: nn.Module, into: Into, missing: Collection[str]) -> nn.Module:
    import peft

    # The outermost modules of which the checkpoint has nothing, such as a new head or a new pooler, are trained whole.
    whole: list[str] = []
    for place, module in model.named_modules():
        inside = [f"{place}.{name}" for name, _ in module.named_parameters()]
        nested = any(place.startswith(f"{outer}.") for outer in whole)
        if place and inside and not nested and all(name in missing for name in inside):
            whole.append(place)
    shared: dict[str, Any] = {"task_type": _task_type(model), "r": into.r, "modules_to_save": whole or None}
    shared["target_modules"] = _targets(model, into, whole)
    lora: dict[str, Any] = {"lora_alpha": into.alpha, "lora_dropout": into.dropout, "use_dora": into.kind == "dora"}
    config = (
        peft.ShiraConfig(random_seed=into.seed, **shared) if into.kind == "shira" else peft.LoraConfig(**lora, **shared)
    )
    return peft.get_peft_model(model, config)  # type: ignore[arg-type, return-value]


def _targets(model: nn.Module, into: Into, whole: Collection[str]) -> list[str] | str | None:
    """Returns the modules that get a LoRA, as peft takes them. Its "all-linear" would take a token classifier's head too."""
    import peft

    linear = [name for name, module in model.named_modules() if is_linear(module)]
    if into.targets == ("layer-linear",):
        found = [name for name in linear if layer_of(f"{name}.weight") is not None]
        if not found:
            raise ConfigError("lora_targets = layer-linear finds no numbered layers with linear layers in them.")
        return found
    if into.targets != ("all-linear",):
        return list(into.targets) or None
    if _task_type(model) != peft.TaskType.TOKEN_CLS:
        return "all-linear"
    by_peft = ("classifier", "score")  # peft trains these whole
    heads = tuple(f"{name}." for name in (*whole, *by_peft))
    return [name for name in linear if not f"{name}.".startswith(heads)]


def _task_type(model: nn.Module) -> Any:
    """Returns peft's name for the task of the model's head. It decides which heads peft trains, and how it loads a LoRA."""
    import peft

    endings = {
        "ForSequenceClassification": peft.TaskType.SEQ_CLS,
        "ForTokenClassification": peft.TaskType.TOKEN_CLS,
        "ForCausalLM": peft.TaskType.CAUSAL_LM,
        "LMHeadModel": peft.TaskType.CAUSAL_LM,
    }
    name = type(model).__name__
    return next((kind for ending, kind in endings.items() if name.endswith(ending)), None)


def _has_adapters() -> bool:
    try:
        return hasattr(importlib.import_module("adapters"), "init")  # a plain folder of that name has no `init`
    except ImportError:  # it is installed, but with transformers 5 it cannot be imported
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides a warning of transformers that is meant for the developers of these libraries."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
