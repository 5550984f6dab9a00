"""``unmask delta``: lists the checkpoints of a run, or the rungs of its ladder, and writes the delta of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.delta.delta import SparseDelta
from unmask.delta.ladder import Ladder
from unmask.errors import ConfigError
from unmask.files import check_file, check_folder
from unmask.lab.training.series import checkpoint_state, deltas, find_run
from unmask.lab.training.setup import in_words


def write_delta(path: Path, step: int | None, output: Path | None, base: str | None) -> None:
    """Writes the delta of one checkpoint, or of one rung of a ladder, and prints what the delta holds."""
    if output is not None:
        if output.is_file():
            raise ConfigError(f"{str(output)!r} exists already; give another --output.")
        check_file(output, "--output")
    if path.is_file():
        _write_rung(path, step, output, base)
        return
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
    _report(chosen, delta, file)
    if held["method"]["strategy"] != "increment":
        print(
            f"note: {held['method']['name']} does not unmask its budget step by step, as id3 does: the checkpoints of this run "
            "are no series of budgets."
        )


def _write_rung(path: Path, step: int | None, output: Path | None, base: str | None) -> None:
    """Writes the delta of one rung of a ladder: the last one's, or that of a step."""
    if base is not None:
        raise ConfigError("--base is for a run's checkpoints; a ladder holds its deltas as they are. Leave it out.")
    rungs = {rung.provenance.step: rung for rung in Ladder.load(path).rungs}
    chosen = max((each for each in rungs if each is not None), default=None) if step is None else step
    if chosen not in rungs:
        there = ", ".join(str(each) for each in rungs if each is not None)
        raise ConfigError(f"{str(path)!r} has no rung of step {chosen}; it has those of {there}.")
    file = path.parent / f"step-{chosen}.safetensors" if output is None else output
    if file.is_file():
        raise ConfigError(f"{str(file)!r} exists already; give another --output.")
    _report(chosen, rungs[chosen], rungs[chosen].save(check_file(file, "--output")))


def _report(step: int | None, delta: SparseDelta, file: Path) -> None:
    """Prints what a delta holds that was written."""
    held = delta.provenance
    used, budget = held.used or len(delta), "" if held.budget is None else f" (budget {held.budget:,})"
    print(f"step {step}: {used:,} weights unmasked by then{budget}")
    if held.after is not None:
        print(f"evaluated at that step: {in_words(held.after)}")
    print(f"delta: {file} ({file.stat().st_size:,} bytes)")


def list_checkpoints(path: Path, given: Mapping[str, Any]) -> None:
    """Prints for each checkpoint of a run, or rung of a ladder, its step, the weights unmasked by then, and its evaluation."""
    named = [option for option, value in given.items() if value is not None]
    if named:
        raise ConfigError(f"--list writes nothing, and goes without {' and '.join(named)}.")
    if path.is_file():
        print(f"{'step':>8}  {'unmasked':>12}  evaluated")
        for rung in Ladder.load(path).rungs:
            held = rung.provenance
            print(f"{held.step or '-':>8}  {len(rung):>12,}  {in_words(held.after) if held.after else '-'}")
        return
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
