"""The heap of a timed process.

glibc gives the top of its heap back to the system as soon as more than some megabytes of it are free, and takes it again,
page by page, at the next step. With several rows in one process it is chance which row's memory lies at the top, so that one
pays for this at every step and another never. A timed process therefore keeps what it has.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # what glibc itself goes up to; a threshold that is set stops it from adapting both
_NEVER = 2**31 - 1
_OWN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> dict[str, str]:
    """Stops glibc from trimming this process's heap, unless the environment sets its allocator up.

    Returns:
        What was set, for the record; nothing where there is no glibc, or the environment has settings of its own.
    """
    if not sys.platform.startswith("linux") or any(name.startswith(_OWN) for name in os.environ):
        return {}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return {}
    both = mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER)
    return {"trimming of the heap while timed": "off"} if both else {}
