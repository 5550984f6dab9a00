"""The series of models that one run of ``unmask train`` gives: the delta of each of its checkpoints.

While the budget is unmasked step by step, the checkpoint of step t is the model of the smaller budget b(t - 1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from unmask.delta.delta import SparseDelta
from unmask.delta.fingerprint import same_bits
from unmask.errors import ConfigError, DataError, DeltaError, SelectionError
from unmask.integrations.checkpoints import STATE_FILE
from unmask.lab.training.run_folder import RunFolder
from unmask.lab.training.settings import build, read_yaml
from unmask.lab.training.training import Setup, set_up
from unmask.reading import fields, plain, refusing
from unmask.selection.state import read_state


def find_run(path: Path) -> tuple[RunFolder, int | None]:
    """The run that a path names, and the step, if the path names one of its checkpoints.

    Args:
        path: The output folder of a run, or ``RUN/checkpoints/checkpoint-N``.

    Raises:
        ConfigError: The path is neither.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> _ = (run / "config.yaml").write_text("model: roberta-base")
        >>> find_run(run)[1], find_run(run / "checkpoints" / "checkpoint-8")[1]
        (None, 8)
    """
    name = re.fullmatch(r"checkpoint-(\d+)", path.name)
    folder = RunFolder(path.parent.parent if name else path)
    if not folder.config.is_file():
        raise ConfigError(
            f"{str(path)!r} is neither the output folder of a run of `unmask train` nor a checkpoint in one: there is no "
            f"{str(folder.config)!r}. Give RUN, or RUN/checkpoints/checkpoint-N."
        )
    return folder, int(name[1]) if name else None


def deltas(folder: RunFolder, steps: Sequence[int], base: str | None = None) -> Iterator[tuple[int, SparseDelta]]:
    """The deltas of some checkpoints of a run: bit for bit what ``selection.delta()`` gave at those steps.

    The model and the selection are built as the run built them, once, and then hold one checkpoint after the other.

    Args:
        folder: The run.
        steps: Steps that have a whole checkpoint.
        base: The run's base, if it is elsewhere than the run's configuration says.

    Yields:
        The step, and its delta. Its metadata name the checkpoint (``checkpoint``), and hold the evaluation of that step, if
        there was one (``after``).

    Raises:
        ConfigError: A checkpoint is damaged, or the data or the base are not those that the run started from.
        DeltaError: The base, or the random init of what it lacks, is not that of the run's own delta.
        UnmaskError: The run's data or base cannot be loaded.
    """
    for step in steps:
        checkpoint_state(folder, step)  # what cannot be read is refused before the model is loaded
    if not steps:
        return
    setup = _set_up(folder, base)
    own = SparseDelta.load(folder.delta) if folder.delta.is_file() else None
    evaluated = folder.evaluated()
    try:
        for step in steps:
            _load(setup, folder, step)
            after = {"after": evaluated[step]} if step in evaluated else {}
            delta = setup.delta(checkpoint=folder.checkpoint(step).name, **after)
            if own is not None:
                _check_start(delta, own, setup.config.model, folder)
            yield step, delta
    finally:
        setup.selection.release()


def write_series(folder: RunFolder) -> list[tuple[int, int, Path]]:
    """Writes the delta of every whole checkpoint of a run that has none yet, under ``series`` in its folder.

    Returns:
        Of each delta there, by step: the step, the weights unmasked by then, the file.

    Raises:
        UnmaskError: As `deltas`.
    """
    missing = [step for step, found in folder.steps().items() if found.whole and not folder.series_file(step).is_file()]
    for step, delta in deltas(folder, missing):
        delta.save(folder.series_file(step))
    loaded = [(SparseDelta.load(file).metadata, file) for file in folder.series.glob("step-*.safetensors")]
    for metadata, file in loaded:
        with refusing(DeltaError, repr(str(file)), "It is none of this run's; move it elsewhere."):
            fields({"step": plain, "used": plain})(metadata, "its metadata")
    return sorted((metadata["step"], metadata["used"], file) for metadata, file in loaded)


def checkpoint_state(folder: RunFolder, step: int) -> dict[str, Any]:
    """The selection's state in a checkpoint.

    Raises:
        ConfigError: The state is not there, or damaged.
    """
    try:
        return read_state(folder.checkpoint(step) / STATE_FILE)
    except SelectionError as error:
        raise ConfigError(
            f"the checkpoint {str(folder.checkpoint(step))!r} cannot be used: {error} Take another one; "
            f"unmask delta {folder.path} --list shows them."
        ) from error


def _set_up(folder: RunFolder, base: str | None) -> Setup:
    changes = {"output": str(folder.path)} | ({} if base is None else {"model": base})
    try:
        return set_up(build(read_yaml(folder.config) | changes), Console(quiet=True))
    except (ConfigError, DataError) as error:
        raise type(error)(
            f"the run in {str(folder.path)!r} cannot be set up again: {error} A relative path in {str(folder.config)!r} counts "
            "from the folder where the run was started: go there, or give the base with --base."
        ) from error


def _load(setup: Setup, folder: RunFolder, step: int) -> None:
    try:
        setup.selection.load_state_dict(checkpoint_state(folder, step))
    except SelectionError as error:
        raise ConfigError(
            f"{str(folder.checkpoint(step))!r} does not fit the selection that {str(folder.config)!r} makes now, so the "
            f"base {setup.config.model!r}, the data or the configuration are not those that the run started from. Give the "
            f"run's base with --base. {error}"
        ) from error


def _check_start(delta: SparseDelta, own: SparseDelta, model: str, folder: RunFolder) -> None:
    """Refuses another start than that of the run's own delta, where the checkpoint's state cannot tell."""
    comparable = delta.whole.keys() == own.whole.keys()  # a buffer may have changed since
    initial = [name for name in own.overlaid if name in delta.whole]
    same = all(same_bits(delta.whole[name], own.whole[name]) for name in initial)
    if not same or (comparable and delta.base != own.base):
        raise DeltaError(
            f"{model!r} is not the base that the run in {str(folder.path)!r} started from, or the random init of what the base "
            f"lacks is another here: {str(folder.delta)!r} says so. Give the run's base with --base."
        )
