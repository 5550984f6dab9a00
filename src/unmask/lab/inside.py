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
from dataclasses import dataclass
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
        if not self.is_lora:
            return {"kind": self.kind, "reduction": self.reduction}
        more = {"seed": self.seed} if self.kind == "shira" else {"alpha": self.alpha, "dropout": self.dropout}
        return {"kind": self.kind, "r": self.r, **more, "targets": list(self.targets)}


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
    """Raises a MissingExtraError if the library that adds the modules is not installed."""
    if into.is_lora:
        need("peft", "hf")
    elif not _has_adapters():
        raise MissingExtraError(
            f"'adapters' is not installed, and {into.kind} adapters come from it: pip install 'unmask[adapters]', in a "
            "separate environment, because adapters 1.3 pins transformers 4.57 and cannot share one with transformers 5."
        )


def insert(model: Any, into: Into, missing: Collection[str], seed: int) -> Inserted:
    """Adds a LoRA or adapters to a base model, in place.

    ``missing`` names the tensors that the base checkpoint lacks (a new head). ``seed`` seeds the modules' random init.

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

    ``PeftModel.from_pretrained(base, folder)`` loads a LoRA, and ``model.load_adapter(folder)`` bottleneck adapters.
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
    # The task of the model's head decides which heads peft trains, and how it loads a LoRA.
    tasks = {
        "ForSequenceClassification": peft.TaskType.SEQ_CLS,
        "ForTokenClassification": peft.TaskType.TOKEN_CLS,
        "ForCausalLM": peft.TaskType.CAUSAL_LM,
        "LMHeadModel": peft.TaskType.CAUSAL_LM,
    }
    task = next((task for ending, task in tasks.items() if type(model).__name__.endswith(ending)), None)
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    targets: list[str] | str | None = list(into.targets) or None
    if into.targets == ("layer-linear",):
        targets = [name for name in linear if layer_of(f"{name}.weight") is not None]
        if not targets:
            raise ConfigError("lora_targets = layer-linear finds no numbered layers with linear layers in them.")
    elif into.targets == ("all-linear",):
        targets = "all-linear"
        if task == peft.TaskType.TOKEN_CLS:  # of a token classifier, peft's "all-linear" would take the head too
            heads = tuple(f"{name}." for name in (*whole, "classifier", "score"))  # peft trains the last two whole
            targets = [name for name in linear if not f"{name}.".startswith(heads)]
    both: dict[str, Any] = {"task_type": task, "r": into.r, "target_modules": targets, "modules_to_save": whole or None}
    lora: dict[str, Any] = {"lora_alpha": into.alpha, "lora_dropout": into.dropout, "use_dora": into.kind == "dora"}
    config = (
        peft.ShiraConfig(random_seed=into.seed, **both) if into.kind == "shira" else peft.LoraConfig(**lora, **both)
    )
    return peft.get_peft_model(model, config)  # type: ignore[arg-type, return-value]


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
