"""SelectiveConfig: an adapter's method and budget, as PEFT stores it in ``adapter_config.json``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, get_args

from peft.utils import PeftType, register_peft_method

from peft import PeftConfig
from unmask.distributed.reducer import Exchange
from unmask.errors import MethodError
from unmask.methods import presets as methods
from unmask.methods.method import Budget, Method
from unmask.peft.card import write_card
from unmask.reading import (
    Malformed,
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
from unmask.selection.refusals import ClipScope, check_exchange

METHODS = ("id3", "repeat_d3", "static_d3", "pafi", "bitfit", "random_mask")
_ALLOWED = {
    "accumulation": ("candidates", "exact"),
    "gradients": ("auto", "sampled", "dense"),
    "exchange": get_args(Exchange),
    "clip_scope": get_args(ClipScope),
}
_ELSEWHERE = {
    "fish": "it needs a loader, which no adapter_config.json can hold: use unmask.select(model, unmask.fish(...))",
    "full": "it has no budget: use modules_to_save",
}


@dataclass
class SelectiveConfig(PeftConfig):
    """What `peft.get_peft_model` needs to train a budget of single weights of a base model.

    Attributes:
        budget: B: a count, or a share of the base's parameters (``"0.17%"``); None (only for ``bitfit``) takes all biases.
        method: ``"id3"``, ``"repeat_d3"``, ``"static_d3"``, ``"pafi"``, ``"bitfit"`` or ``"random_mask"``.
        eps: Added to ``|w|`` in D3.
        exp: Exponent of D3.
        stride: Select every ``stride``-th step (``id3``, ``repeat_d3``).
        schedule: ``"uniform"``, ``"cosine"`` or ``"front-loaded"`` (``id3``).
        seed: For ``random_mask``.
        allocation: ``"global"``, ``"tensor"``, ``"row"`` or ``"column"``.
        accumulation: ``"candidates"`` or ``"exact"``: the selection that gradient accumulation makes.
        gradients: ``"auto"``, ``"sampled"`` or ``"dense"``.
        exchange: How several processes select together: ``"exact"``, ``"candidates"`` or ``"none"``; see `unmask.select`.
        clip_scope: Which norm a ``transformers.Trainer`` (by ``max_grad_norm``) and `unmask.peft.clip_grad_norm_` clip by:
            ``"selected"``, of what is trained; or ``"all"``, of every eligible weight too; see `unmask.select`.
        target_modules: Modules whose parameters (those of modules inside them too) are eligible: names or name endings,
            one regular expression that matches whole names, or ``"all-linear"``. None: the whole model.
        exclude_modules: Modules whose parameters are not; names or name endings, or one regular expression.
        modules_to_save: Modules trained and saved whole, outside the budget: a new head, say.
        total_steps: T, the planned number of optimizer steps, over which ``id3`` spreads its budget. None: taken from
            the ``transformers.Trainer`` that runs the first step.
        training_state: Whether a saved adapter also holds what training needs to go on bit for bit (the order of
            unmasking, and float32 masters in half precision): 4 bytes a weight, 8 in half precision. False: values alone.
        record: What the adapter holds, filled when it is saved: the delta's metadata, and the base's fingerprint.

    Raises:
        MethodError: A method, budget, schedule or number that cannot work.

    Example:
        >>> SelectiveConfig(budget=320_000, total_steps=1_000).build(320_000).name
        'id3'
    """

    budget: Budget | None = field(default=None, metadata={"help": "A count of weights, or a share such as '0.17%'."})
    method: str = field(default="id3", metadata={"help": "Which weights are unmasked, and when."})
    eps: float = field(default=1.0, metadata={"help": "Added to |w| in D3."})
    exp: float = field(default=2.0, metadata={"help": "Exponent of D3."})
    stride: int = field(default=1, metadata={"help": "Select every stride-th step."})
    schedule: str = field(default="uniform", metadata={"help": "How the budget is spread over the steps."})
    seed: int = field(default=0, metadata={"help": "Seed of random_mask."})
    allocation: str = field(default="global", metadata={"help": "global, tensor, row or column."})
    accumulation: str = field(default="candidates", metadata={"help": "candidates or exact."})
    gradients: str = field(default="auto", metadata={"help": "auto, sampled or dense."})
    exchange: str = field(default="exact", metadata={"help": "exact, candidates or none: several processes."})
    clip_scope: str = field(default="selected", metadata={"help": "selected or all."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that are eligible."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules that are not."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    total_steps: int | None = field(default=None, metadata={"help": "Planned number of optimizer steps."})
    training_state: bool = field(default=True, metadata={"help": "Save what training needs to go on bit for bit."})
    record: dict[str, Any] | None = field(default=None, metadata={"help": "What the saved adapter holds."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if isinstance(self.target_modules, set):
            self.target_modules = sorted(self.target_modules)
        with refusing(
            MethodError, "this SelectiveConfig", "Give another value (in adapter_config.json, if it stands there)."
        ):
            _FORM(vars(self), "config")
            _check_expressions(self)
        if self.method not in METHODS:
            why = _ELSEWHERE.get(self.method, "there are " + ", ".join(METHODS))
            raise MethodError(f"method = {self.method!r}; {why}.")
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise MethodError(f"{name} = {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if self.budget is None and self.method != "bitfit":
            raise MethodError("budget is missing; give a count (320_000) or a share of the parameters ('0.17%').")
        if self.clip_scope == "all" and self.gradients == "sampled":
            raise MethodError("clip_scope='all' needs the whole gradient at every step; leave gradients='auto'.")
        check_exchange(self.exchange, self.build(self.budget))  # refuses what cannot work now, not at the first step

    @property
    def needs_total_steps(self) -> bool:
        """Whether the method cannot start before T is known."""
        return self.method == "id3" and self.total_steps is None

    def build(self, budget: Budget | None) -> Method:
        """The method with this budget; with one step, while T is not known."""
        steps = 1 if self.total_steps is None else self.total_steps
        method = methods.build(self.method, {**vars(self), "budget": budget, "steps": steps})
        return method.but(allocation=self.allocation)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; and once an adapter is saved, its figures into the model card beside it."""
        super().save_pretrained(save_directory, **kwargs)
        if self.record is not None:
            write_card(save_directory, self.record)


def _names(value: Any, where: str) -> Any:
    """One regular expression, or some names."""
    if isinstance(value, str):
        return value
    return items(text)(list(value) if isinstance(value, set) else value, where)


_FORM = fields(
    {
        **dict.fromkeys(("method", "schedule", "allocation", *_ALLOWED), text),
        **dict.fromkeys(("eps", "exp"), finite),
        **dict.fromkeys(("stride", "seed"), count),
        **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), optional(_names)),
        "total_steps": optional(count),
        "training_state": flag,
        "record": optional(mapping(plain)),
        "base_model_name_or_path": optional(text),
    }
)


def _check_expressions(config: SelectiveConfig) -> None:
    for name in ("target_modules", "exclude_modules"):
        given = getattr(config, name)
        if isinstance(given, str):
            try:
                re.compile(given)
            except (re.error, RecursionError, OverflowError) as error:
                raise Malformed(f"{name} = {shown(given)} is no regular expression ({error})") from error


NAME = "UNMASK"
PREFIX = "unmask_"  # part of every key of an adapter in a state dict


def peft_type() -> PeftType:
    """``PeftType.UNMASK``.

    PEFT looks method names up in a closed enum, in some versions by going through its members, so nothing less than a
    member will do.
    """
    if NAME not in PeftType.__members__:
        member: Any = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member.__objclass__, member._sort_order_ = PeftType, len(PeftType.__members__)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]


def register(config: type, tuner: type) -> None:
    """Makes PEFT know the method: `get_peft_model`, `PeftModel.from_pretrained` and the rest then find it."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config, model_cls=tuner, prefix=PREFIX)
