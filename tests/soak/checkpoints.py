"""All kill points of a run, of its resumption and of an overwrite, and all full disks: each gone on with, bit for bit.

``python tests/soak/checkpoints.py --seed 0 --seconds 300``: in an order that the seed shuffles, until all are done or the time
is over. Prints the counts; ends with status 1 at the first run whose result is another.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from kill_points import Content, FullDisk, content, hearing, restore
from whole_runs import go, go_on, newest_step, recorded, result, small_world

from unmask.errors import UnmaskError
from unmask.lab.training.config import TrainConfig

Case = tuple[str, Callable[[Path], str]]


def cases(config: TrainConfig, root: Path) -> list[Case]:
    """Every case by its kind; each makes a run in a folder, which must end as the uninterrupted one."""
    whole = recorded(config).left_by_kills()
    found: list[Case] = [("kill", lambda folder, state=state: go_on(config, state, folder)) for state in whole]
    at_four = next(state for i, state in enumerate(whole) if _step(state, root / f"look{i}") == 4)
    restore(at_four, root / "again")
    found += [
        ("kill while resumed", lambda folder, state=state: go_on(config, state, folder))
        for state in recorded(replace(config, output=str(root / "again")), resume=True).left_by_kills()
    ]
    go(replace(config, seed=1), root / "over")
    found += [
        ("kill of an overwrite", lambda folder, state=state: _overwrite_again(config, state, folder))
        for state in recorded(replace(config, output=str(root / "over")), overwrite=True).left_by_kills()
    ]
    operations = _operations(config, root / "counted")
    found += [
        ("full disk", lambda folder, operation=operation: _full(config, operation, folder))
        for operation in range(1, operations + 1)
    ]
    return found


def _step(state: Content, folder: Path) -> int:
    restore(state, folder)
    step = newest_step(folder)
    shutil.rmtree(folder)
    return step


def _overwrite_again(config: TrainConfig, state: Content, folder: Path) -> str:
    """Resumes where that is the new run, and otherwise overwrites again; the old run must not come back."""
    restore(state, folder)
    try:
        go(config, folder, resume=True)
        return "resumed"
    except UnmaskError:
        go(config, folder, overwrite=True)
        return "overwritten again"


def _operations(config: TrainConfig, folder: Path) -> int:
    disk = FullDisk(10**9)
    with hearing(folder, disk):
        go(config, folder)
    return 10**9 - disk.left


def _full(config: TrainConfig, operation: int, folder: Path) -> str:
    disk = FullDisk(operation)
    try:
        with hearing(folder, disk):
            go(config, folder)
        return "went through"  # the name of a lock's holder
    except UnmaskError:
        pass
    left = content(folder) if folder.exists() else {}
    shutil.rmtree(folder, ignore_errors=True)
    return go_on(config, left, folder)


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    end, counts = time.monotonic() + given.seconds, Counter()
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        config = small_world(root)
        todo = cases(config, root)
        right = result(Path(config.output))
        random.Random(given.seed).shuffle(todo)
        for i, (kind, case) in enumerate(todo):
            if time.monotonic() > end:
                break
            how = case(root / f"case{i}")
            if result(root / f"case{i}") != right:
                sys.exit(f"{kind}: another result after it was {how} (seed {given.seed}, case {i})")
            counts[kind, how] += 1
            shutil.rmtree(root / f"case{i}")
    done = sum(counts.values())
    print(f"checkpoints: {done} of {len(todo)} cases, seed {given.seed}, the same result in each")
    for (kind, how), count in sorted(counts.items()):
        print(f"  {kind}: {count} {how}")


if __name__ == "__main__":
    main()
