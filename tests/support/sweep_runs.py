"""Makes runs of sweeps in worker processes, for tests: some fail, some die, some take many steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOSSES = {1e-4: 0.7, 1e-3: 0.5, 1e-2: 0.6}


def count(folder: Path, what: str) -> int:
    """Notes in the run's folder that something happened, and returns how often it has happened."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / what).open("a") as file:
        file.write(f"{os.getpid()}\n")
    return times(folder, what)


def times(folder: Path, what: str) -> int:
    """Returns how often something has happened, by the run's folder."""
    path = folder / what
    return len(path.read_text().split()) if path.is_file() else 0


def scored(settings: Mapping[str, Any]) -> dict[str, Any]:
    loss = LOSSES.get(settings.get("lr", 1e-3), 1.0) + settings.get("seed", 0) / 1000
    return {"score": 1 - loss, "loss": loss, "metric": "accuracy"}


def quick(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    count(folder, "starts")
    print("printed by the run", settings.get("seed", 0))
    return scored(settings)


def threads(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return scored(settings) | {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}


def failing(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if count(folder, "starts") == 1 and settings.get("lr") == 1e-2:
        raise ValueError("the loss is <NaN> [/b]")
    return scored(settings)


def dying(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Kills its process in the first attempt at 1e-4, and in every attempt at 1e-2."""
    attempt = count(folder, "starts")
    if settings.get("lr") == 1e-2 or (settings.get("lr") == 1e-4 and attempt == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return scored(settings)


def stepping(settings: Mapping[str, Any], folder: Path, steps: int = 20, each: float = 0.03) -> dict[str, Any]:
    """Counts its steps in a file, goes on from the last step after a kill, and stops after a whole step on Ctrl-C."""
    stop: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.append(number))
    try:
        # All steps may be there already, if the run was killed after the last one and before its result was written.
        while times(folder, "steps") < steps:
            count(folder, "steps")
            time.sleep(each)
            if stop:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
    return scored(settings) | {"steps": times(folder, "steps")}
