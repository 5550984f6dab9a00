"""What several processes would print each, printed once."""

from __future__ import annotations

import datetime
import hashlib
import os
from typing import Any

import torch.distributed as dist

from unmask.distributed.processes import launched

_WAIT = datetime.timedelta(seconds=10)  # for the store


def first_to_say(text: str) -> bool:
    """Whether no other process of this run has said the same yet: the store of torchrun or of the process group knows.

    An error that only one process has is said by that process, whichever it is; one that all have is said by the first.

    Example:
        >>> first_to_say("a process that trains alone says everything")
        True
    """
    if launched() == 1:
        return True
    key = f"unmask/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        return int(_store().add(key, 1)) == 1
    except (RuntimeError, ValueError, KeyError):  # no store, or its host is gone: better twice than never
        return True


def _store() -> Any:
    distributed: Any = dist
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # there before the process group, and after it
        return distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_WAIT
        )
    return distributed.distributed_c10d._get_default_store()
