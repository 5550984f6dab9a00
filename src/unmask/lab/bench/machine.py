"""What a benchmark ran on: hardware, versions, free memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF")  # peak memory depends on them
_PACKAGES = ("torch", "transformers", "peft", "selective-optimizers", "numpy", "triton", "unmask")


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Hardware, versions, and the commit if unmask runs from a git checkout."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": _meminfo("MemTotal"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "allocator": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_ALLOCATOR)},
    }


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free for this process: the device's, or the machine's within its control group; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free, within = _meminfo("MemAvailable"), _group_bytes(Path("/sys/fs/cgroup"))
    return min((known for known in (free, within) if known is not None), default=None)


def peak_bytes() -> int:
    """The largest resident size of this process so far.

    Linux's ``VmHWM``: unlike ``ru_maxrss`` it does not inherit the size of the process that started this one.
    """
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def resident_bytes() -> int | None:
    """The resident size of this process now; None if unknown."""
    return _status("VmRSS")


def _status(key: str) -> int | None:
    return _kilobytes(Path("/proc/self/status"), key)


def _meminfo(key: str) -> int | None:
    return _kilobytes(Path("/proc/meminfo"), key)


def _kilobytes(path: Path, key: str) -> int | None:
    if not path.is_file():
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _group_bytes(folder: Path) -> int | None:
    """What a control group's limit leaves, cached files counted as free; None without a limit."""
    files = [folder / name for name in ("memory.max", "memory.current", "memory.stat")]
    if not all(path.is_file() for path in files):
        return None
    limit, used, stat = (path.read_text().strip() for path in files)
    cached = re.search(r"^file (\d+)$", stat, re.MULTILINE)
    return int(limit) - int(used) + (int(cached.group(1)) if cached else 0) if limit.isdigit() else None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with a plus sign if tracked files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # or the checkout is somebody else's
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
