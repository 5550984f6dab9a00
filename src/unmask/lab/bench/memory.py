"""Peak memory: each row in a process of its own, with the same imports, the same model and the same batches.

Run as ``python -m unmask.lab.bench.memory SETTINGS LABEL`` by `measure`; the figures are one line of JSON on standard output.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from unmask.lab.bench.processes import command, ending, environment, heard, say, told
from unmask.lab.bench.rows import Row
from unmask.lab.bench.settings import BenchSettings

RAMP = 50  # steps in which an ID3 row fills half of its budget: at once it would cost memory that no real run needs
_STEPS = 3  # at least
_MARK = "unmask-bench-memory:"


def measure(settings: BenchSettings, row: Row) -> dict[str, Any]:
    """One row's memory figures, from a fresh process.

    Returns:
        ``peak_mb`` (the process's largest resident size; on CUDA the largest allocation on the device), ``before_mb``
        (resident before the first step), ``state_bytes``, ``trainable``, ``trained``, ``saved_bytes``; or ``error``.
    """
    words = command("unmask.lab.bench.memory", settings, row)
    done = subprocess.run(words, capture_output=True, text=True, env=environment(settings))
    for line in done.stdout.splitlines():
        said = heard(_MARK, line)
        if said is not None:
            return said
    return {"error": _reason(done.returncode, done.stderr)}


def _reason(code: int, stderr: str) -> str:
    return ending(code, (stderr.strip().splitlines() or [""])[-1][:300])


def run(settings: BenchSettings, row: Row) -> dict[str, Any]:
    """Trains a row for a whole cycle and one step more, in this process, and reads its figures.

    An ID3 row fills half of its budget before, on two tokens a step, so that it is measured in the middle of a run.
    """
    import torch

    from unmask.lab.bench.builders import build
    from unmask.lab.bench.contender import state_bytes
    from unmask.lab.bench.machine import peak_bytes, resident_bytes
    from unmask.lab.bench.models import blueprint
    from unmask.lab.bench.quiet import import_peers

    import_peers()
    torch.set_num_threads(settings.threads)
    plan = blueprint(settings)
    count = max(_STEPS, row.cycle + 1)
    ramp = RAMP if row.kind.startswith("id3") else 0
    contender = build(row, plan, settings, count // row.cycle + 1, ramp)
    batches = plan.batches()
    before = _device_bytes(plan.device) or resident_bytes()
    built = peak_bytes()
    small = {name: tensor[:1, :2] if tensor.dim() == 2 else tensor[:1] for name, tensor in batches[0].items()}
    for i in range(ramp + count):
        contender.step(small if i < ramp else batches[i % len(batches)], settings.dtype == "autocast")
    # Linux counts both to within some pages, which is enough for a peak below what it peaked from
    peak = _device_bytes(plan.device, peak=True) or max(peak_bytes(), before or 0)
    return {
        "peak_mb": peak / 1e6,
        "before_mb": before / 1e6 if before else None,
        "built_peak_mb": built / 1e6,
        "host_peak_mb": peak_bytes() / 1e6,
        "steps": count,
        "state_bytes": state_bytes(contender.optimizer),
        "trainable": contender.trainable,
        "trained": contender.trained(),
        **_saved(contender),
    }


def _device_bytes(device: Any, peak: bool = False) -> int | None:
    import torch

    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def _saved(contender: Any) -> dict[str, Any]:
    """Bytes of what a user keeps. Read after the peak: saving is no part of training."""
    if contender.save is None:
        return {"saved_bytes": None}
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {"saved_bytes": contender.save(Path(folder))}
        except Exception as error:  # a peer that cannot save has still been measured
            return {"saved_bytes": None, "saved_error": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    """The entry of a row's process."""
    settings, row = told(sys.argv)
    say(_MARK, run(settings, row))


if __name__ == "__main__":
    main()
