"""T, the planned number of optimizer steps, where nobody has given it."""

from __future__ import annotations

import inspect
import sys
from types import FrameType

from unmask.errors import MethodError


def steps_of_caller() -> int | None:
    """The planned steps of the ``transformers.Trainer`` that is running this forward; None if none is.

    A Trainer works T out when it starts and tells the model nothing, nor can a model add a callback to it. It is, however,
    on the call stack of the first forward, where T is needed.
    """
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and trainer is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, trainer) and caller.state.max_steps > 0:
            return int(caller.state.max_steps)
        frame = frame.f_back
    return None


def not_known(adapter: str) -> MethodError:
    """The error of a first step whose T nobody knows."""
    return MethodError(
        f"adapter {adapter!r} spreads its budget over total_steps, which is not set, and no transformers Trainer runs this "
        "step. Give SelectiveConfig(total_steps=...) the planned number of optimizer steps, or set "
        f"model.peft_config[{adapter!r}].total_steps before the first step."
    )
