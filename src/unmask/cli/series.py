"""``unmask delta``: lists the checkpoints of a run, and writes the delta of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.files import check_file, check_folder
from unmask.lab.training.series import checkpoint_state, deltas, find_run
from unmask.lab.training.setup import in_words


def write_delta(path: Path, step: int | None, output: Path | None, base: str | None) -> None:
    """Writes the delta of one checkpoint, and prints what the delta holds."""
    if output is not None:
        if output.is_file():
            raise ConfigError(f"{str(output)!r} exists already; give another --output.")
        check_file(output, "--output")
    folder, named = find_run(path)
    if step is not None and named not in (None, step):
        raise ConfigError(
            f"{str(path)!r} is the checkpoint of step {named}, and --step {step} asks for another; give one."
        )
    chosen = folder.whole_step(step if named is None else named)
    if output is None:
        check_folder(folder.series, "--output")
    [(_, delta)] = deltas(folder, [chosen], base)
    file, held = delta.save(folder.series_file(chosen) if output is None else output), delta.metadata
    print(f"step {chosen}: {held['used']:,} weights unmasked by then (budget {held['budget']:,})")
    if "after" in held:
        print(f"evaluated at that step: {in_words(held['after'])}")
    print(f"delta: {file} ({file.stat().st_size:,} bytes)")
    if held["method"]["strategy"] != "increment":
        print(
            f"note: {held['method']['name']} does not unmask its budget step by step, as id3 does: the checkpoints of this run "
            "are no series of budgets."
        )


def list_checkpoints(path: Path, given: Mapping[str, Any]) -> None:
    """Prints the step of each checkpoint of a run, the number of weights unmasked by then, and the evaluation of that step."""
    named = [option for option, value in given.items() if value is not None]
    if named:
        raise ConfigError(f"--list writes nothing, and goes without {' and '.join(named)}.")
    folder, _ = find_run(path)
    folder.whole_step(None)
    evaluated = folder.evaluated()
    print(f"{'step':>8}  {'unmasked':>12}  evaluated")
    for step, found in folder.steps().items():
        try:
            used = int(checkpoint_state(folder, step)["used"]) if found.whole else None
        except ConfigError:
            used = None
        if used is None:
            print(f"{step:>8}  {'-':>12}  incomplete or damaged")
        else:
            print(f"{step:>8}  {used:>12,}  {in_words(evaluated[step]) if step in evaluated else '-'}")
