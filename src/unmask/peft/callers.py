"""Who is calling: PEFT and transformers tell a tuner neither its `PeftModel` nor its Trainer; both are on the call stack."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any


def caller(kind: type) -> Any:
    """The innermost object of a kind whose method is running; None if none is."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, kind):
            return found
        frame = frame.f_back
    return None


def calling_trainer() -> Any:
    """The ``transformers.Trainer`` (or one of a subclass) that is running; None if none is."""
    kind = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    return None if kind is None else caller(kind)
