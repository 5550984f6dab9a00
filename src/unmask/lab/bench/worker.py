"""Trains one row and reports its step times, its peak memory and its bytes on disk.

`unmask.lab.bench.run` starts it as ``python -m unmask.lab.bench.worker SETTINGS LABEL FILE``, a fresh process for every row
and draw. The worker writes its report into FILE as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unmask.lab.bench.contenders import Contender, build, state_bytes
from unmask.lab.bench.models import Batch, blueprint
from unmask.lab.bench.rows import Row
from unmask.lab.bench.settings import BenchSettings

_PEERS = ("transformers", "peft", "selective_optimizers.wrap")


def measure(settings: BenchSettings, row: Row) -> dict[str, Any]:
    """Trains a row in this process.

    An ID3 row first fills half of its budget, in one step per batch on the first quarter of each sequence, so that it is
    measured in the middle of a run. Shorter sequences keep the memory of these steps below that of the others. The warm-up
    and the timed steps follow, on whole batches.

    Returns:
        A report of JSON values. ``steps``: the timed steps. ``weights``: the counts of weights and other facts of the row.
        ``memory``: ``peak_mb`` (the largest resident size of this process; on CUDA the largest allocation on the device),
        ``before_mb`` (the same before the first step), ``host_peak_mb``, ``state_bytes`` of the optimizer, and
        ``saved_bytes`` of what a user keeps of a run.
    """
    plan = blueprint(settings)
    contender = build(row, plan, settings)
    batches = plan.batches()
    autocast = settings.dtype == "autocast"
    on_cuda = plan.device.type == "cuda"
    before = torch.cuda.memory_allocated(plan.device) if on_cuda else _status("VmRSS")
    start(contender, batches, settings)
    gc.collect()
    gc.disable()  # Otherwise the garbage collector would run in some of the steps and not in others.
    try:
        count = row.cycle * row.cycles(settings.steps)
        steps = [contender.step(batches[i % len(batches)], autocast) for i in range(count)]
    finally:
        gc.enable()
    # Linux counts both sizes to within some pages, so the peak may seem to be below the size from which it rose.
    peak = torch.cuda.max_memory_allocated(plan.device) if on_cuda else max(peak_bytes(), before or 0)
    memory: dict[str, Any] = {
        "peak_mb": peak / 1e6,
        "before_mb": before / 1e6 if before else None,
        "host_peak_mb": peak_bytes() / 1e6,
        "state_bytes": state_bytes(contender.optimizer),
        "saved_bytes": None,
    }
    with tempfile.TemporaryDirectory() as folder:  # Saving is not part of training, so it comes after the peak is read.
        try:
            memory["saved_bytes"] = contender.save(Path(folder)) if contender.save else None
        except Exception as error:  # The step of a method that cannot save has been measured all the same.
            memory["saved_error"] = short(error)
    return {"steps": [dataclasses.asdict(step) for step in steps], "weights": contender.weights(), "memory": memory}


def start(contender: Contender, batches: Sequence[Batch], settings: BenchSettings) -> None:
    """Runs the ramp of an ID3 row and the warm-up, so that the next step is the first of a timed cycle."""
    autocast = settings.dtype == "autocast"
    for batch in batches if contender.row.selects else ():
        length = max(2, batch["input_ids"].shape[1] // 4)
        short_batch = {name: tensor[:, :length] if tensor.dim() == 2 else tensor for name, tensor in batch.items()}
        contender.step(short_batch, autocast)
    for i in range(settings.warmup):
        contender.step(batches[i % len(batches)], autocast)


def peak_bytes() -> int:
    """Returns the largest resident size of this process so far.

    On Linux this is ``VmHWM``. Unlike ``ru_maxrss`` it does not inherit the size of the process that started this one.
    """
    if (peak := _status("VmHWM")) is not None:
        return peak
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _status(key: str) -> int | None:
    """Returns a size of this process in bytes, as Linux counts it; None where it is not known."""
    found = read_proc("self/status", rf"^{key}:\s+(\d+) kB")
    return int(found) * 1024 if found else None


def read_proc(file: str, pattern: str) -> str | None:
    """Returns the text of the pattern's group in a file of Linux's ``/proc``; None if there is none."""
    path = Path("/proc", file)
    found = re.search(pattern, path.read_text(), re.MULTILINE) if path.is_file() else None
    return found[1] if found else None


def short(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its text, at most 300 characters of it.

    Example:
        >>> short(ValueError("no such thing\\nat all"))
        'ValueError: no such thing'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def main() -> None:
    """Measures the row that the command line names and writes the report, or the error that ended the row."""
    settings = BenchSettings(**json.loads(sys.argv[1]))
    row = next(row for row in settings.rows() if row.label == sys.argv[2])
    os.environ["HF_HUB_OFFLINE"] = "1"
    with contextlib.suppress(OSError):  # Should memory run out, Linux ends this process before any other.
        Path("/proc/self/oom_score_adj").write_text("1000")
    for name in _PEERS:  # Every row's process holds the same libraries, so their memory counts alike.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\.")
    try:
        report = measure(settings, row)
    except Exception as error:
        report = {"error": short(error)}
    Path(sys.argv[3]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
