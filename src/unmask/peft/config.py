"""SelectiveConfig: an adapter's method and budget, as PEFT stores them in ``adapter_config.json``."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from peft.utils import PeftType

from peft import PeftConfig
from unmask.errors import MethodError
from unmask.methods import presets as methods
from unmask.methods.budget import Budget
from unmask.methods.method import Accumulation, ClipScope, Exchange, Gradients, Method, check_word
from unmask.peft.card import write_card
from unmask.reading import (
    Malformed,
    choices,
    count,
    fields,
    finite,
    flag,
    items,
    mapping,
    optional,
    plain,
    refusing,
    shown,
    text,
)
from unmask.selection.refusals import check_exchange

OPTIONS = {"accumulation": Accumulation, "gradients": Gradients, "exchange": Exchange, "clip_scope": ClipScope}
"""The options of `unmask.select` that a configuration has, and their words."""
_REFUSED = {
    "fish": "it needs a loader, which no adapter_config.json can hold: use unmask.select(model, unmask.fish(...))",
    "full": "it has no budget: use modules_to_save",
    "sparse_adapter": "it prunes modules that are added to the base, and this adapter selects in the base itself: use "
    "unmask.select(model, unmask.sparse_adapter(...))",
}
"""The presets that an adapter cannot have, and why."""


@dataclass
class SelectiveConfig(PeftConfig):
    """The settings that `peft.get_peft_model` needs to train a budget of single weights of a base model.

    Attributes:
        budget: B, a count or a share of the base's parameters (``"0.17%"``); None (only for ``bitfit``) takes all biases.
        method: The name of a preset: ``"id3"``, ``"repeat_d3"``, ``"static_d3"``, ``"pafi"``, ``"bitfit"`` or
            ``"random_mask"``. ``"fish"``, ``"sparse_adapter"`` and ``"full"`` are refused.
        eps: The number that D3 adds to ``|w|``.
        exp: The exponent of D3.
        stride: The method selects at every ``stride``-th step (``id3``, ``repeat_d3``).
        schedule: How ``id3`` spreads the budget over the steps: ``"uniform"``, ``"cosine"``, ``"front-loaded"`` or
            ``"at-once"``.
        heuristic: The heuristic that ranks weights in place of D3 (``id3``, ``repeat_d3``, ``static_d3``), such as
            ``"snip"``, or one of your own (`unmask.register_heuristic`); None for D3.
        scope: Which tensors are eligible, among those of the target modules: ``"all"``, ``"linear"``, ``"bias"`` or
            ``"vector"``; None for the method's own scope.
        seed: The seed of ``random_mask``, and of the heuristic ``"random"``.
        allocation: How the budget spreads over the eligible tensors: ``"global"``, ``"tensor"``, ``"row"`` or ``"column"``.
        accumulation: The selection under gradient accumulation, ``"candidates"`` or ``"exact"``. This option and the next
            three are those of `unmask.select`.
        gradients: How gradients are formed: ``"auto"``, ``"sampled"`` or ``"dense"``.
        exchange: How several processes select together: ``"exact"``, ``"candidates"`` or ``"none"``.
        clip_scope: The norm that a ``transformers.Trainer`` (by ``max_grad_norm``) and `unmask.peft.clip_grad_norm_` clip by:
            ``"selected"`` for that of what is trained, ``"all"`` for that of every eligible weight.
        target_modules: The modules whose parameters (those of modules inside them too) are eligible: names or name endings,
            one regular expression that matches whole names, or ``"all-linear"``; None for the whole model.
        exclude_modules: The modules whose parameters are not eligible: names or name endings, or one regular expression.
        modules_to_save: The modules that are trained and saved whole, outside the budget, such as a new head.
        total_steps: T, the planned number of optimizer steps, over which ``id3`` spreads its budget. None takes it from
            the ``transformers.Trainer`` that runs the first step.
        training_state: True if a saved adapter also holds what training needs to go on bit for bit (the order of unmasking,
            and float32 masters in half precision): 4 bytes a weight, 8 in half precision. With False it holds values alone.
        record: What the adapter holds: the delta's metadata and the base's fingerprint. It is filled when it is saved.

    Raises:
        MethodError: A method, budget, schedule or number cannot work, or an adapter cannot have the method.

    Example:
        >>> SelectiveConfig(budget=320_000, total_steps=1_000).build(320_000).name
        'id3'
    """

    budget: int | str | None = None
    method: str = "id3"
    eps: float = 1.0
    exp: float = 2.0
    stride: int = 1
    schedule: str = "uniform"
    heuristic: str | None = None
    scope: str | None = None
    seed: int = 0
    allocation: str = "global"
    accumulation: str = "candidates"
    gradients: str = "auto"
    exchange: str = "exact"
    clip_scope: str = "selected"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    total_steps: int | None = None
    training_state: bool = True
    record: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        advice = "Give another value (in adapter_config.json, if it stands there)."
        with refusing(MethodError, "this SelectiveConfig", advice):
            _FORM(vars(self), "config")
        if self.method in _REFUSED:
            raise MethodError(f"method = {self.method!r}; {_REFUSED[self.method]}.")
        if self.method not in methods.PRESETS:
            known = [name for name in methods.PRESETS if name not in _REFUSED]
            raise MethodError(f"method = {self.method!r}; there are {choices(self.method, known)}.")
        for name, words in OPTIONS.items():
            check_word(name, getattr(self, name), words)
        if self.budget is None and self.method != "bitfit":
            raise MethodError("budget is missing; give a count (320_000) or a share of the parameters ('0.17%').")
        if self.clip_scope == "all" and self.gradients == "sampled":
            raise MethodError("clip_scope='all' needs the whole gradient at every step; leave gradients='auto'.")
        check_exchange(self.exchange, self.build(self.budget))  # what cannot work is refused now, not at the first step

    @property
    def needs_total_steps(self) -> bool:
        """True if the method cannot start before T is known."""
        takes_steps = "steps" in inspect.signature(methods.PRESETS[self.method]).parameters
        return takes_steps and self.total_steps is None

    def build(self, budget: Budget | int | str | None) -> Method:
        """Builds the method with this budget. While T is not known, it is planned over one step.

        Raises:
            MethodError: The method cannot work with these settings.
        """
        steps = 1 if self.total_steps is None else self.total_steps
        return methods.build(self.method, {**vars(self), "budget": budget, "steps": steps})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the configuration as PEFT does. If an adapter was saved, it also writes its figures into the model card there."""
        super().save_pretrained(save_directory, **kwargs)
        if self.record is not None:
            write_card(save_directory, self.record)


def _names(value: Any, where: str) -> Any:
    """Accepts one regular expression, or some names."""
    if not isinstance(value, str):
        return items(text)(list(value) if isinstance(value, set) else value, where)
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise Malformed(f"{where} = {shown(value)} is not a regular expression ({error})") from error
    return value


_FORM = fields(
    {
        **dict.fromkeys(("method", "schedule", "allocation", *OPTIONS), text),
        **dict.fromkeys(("heuristic", "scope"), optional(text)),
        **dict.fromkeys(("eps", "exp"), finite),
        **dict.fromkeys(("stride", "seed"), count),
        **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), optional(_names)),
        "total_steps": optional(count),
        "training_state": flag,
        "record": optional(mapping(plain)),
        "base_model_name_or_path": optional(text),
    }
)


NAME = "UNMASK"
PREFIX = "unmask_"  # every key of an adapter in a state dict has it


def peft_type() -> PeftType:
    """Returns ``PeftType.UNMASK``, and adds it to the enum first if it is not there.

    PEFT looks method names up in a closed enum, in some versions by going through its members. So the method must be a member.
    """
    if NAME not in PeftType.__members__:
        member: Any = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member.__objclass__, member._sort_order_ = PeftType, len(PeftType.__members__)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]
