"""The heap of a timed process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys
from unmask.lab.bench.heap import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def grow_and_free():
    blocks = [libc.malloc(4 << 20) for _ in range(50)]  # 200 MB, on top of the heap
    for block in blocks:
        ctypes.memset(block, 1, 4 << 20)
    for block in blocks:
        libc.free(block)

libc.free(libc.malloc(28 << 20))  # glibc takes blocks up to this size from the heap from now on
print(keep_freed_memory() if sys.argv[1] == "keep" else {})
grow_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
grow_and_free()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")


def outcome(how: str, **environment: str) -> tuple[str, int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], env=plain | environment, capture_output=True, text=True, check=True
    )
    said, count = done.stdout.strip().splitlines()
    return said, int(count)


def test_a_timed_process_keeps_what_it_freed():
    said, count = outcome("keep")
    _, trimmed = outcome("leave")
    assert "off" in said
    pages = (200 << 20) // resource.getpagesize()
    assert trimmed > pages / 2 > pages / 50 > count


def test_an_allocator_that_is_set_up_is_left_alone():
    assert outcome("keep", MALLOC_ARENA_MAX="2")[0] == "{}"
