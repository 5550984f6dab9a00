"""The method's place among PEFT's own: a member of its enum, and PEFT's registration."""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType, register_peft_method

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
