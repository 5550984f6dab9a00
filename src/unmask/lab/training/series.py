"""Makes a series of models from one run of ``unmask train``: the delta of each of its checkpoints.

While the budget is unmasked step by step, the checkpoint of step t is a model with the smaller budget b(t - 1).
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
from unmask.lab.training.setup import set_up
from unmask.reading import fields, plain, refusing
from unmask.selection.state import read_state


def find_run(path: Path) -> tuple[RunFolder, int | None]:
    """Finds the run that a path names, and the step, if the path names one of the run's checkpoints.

    Raises:
        ConfigError: The path is neither the output folder of a run nor ``RUN/checkpoints/checkpoint-N``.

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
    """Makes the deltas of some checkpoints of a run, bit for bit as ``selection.delta()`` was at those steps.

    The model and the selection are built once, as the run built them, and then load one checkpoint after the other. Each step
    must have a whole checkpoint. ``base`` is where the run's base is now, if it was moved.

    Yields:
        The step, and its delta. The delta's metadata names the checkpoint (``checkpoint``), and holds the evaluation at that
        step (``after``), if there was one.

    Raises:
        ConfigError: A checkpoint is damaged, or the run started from other data or from another base.
        DeltaError: The run's own delta was made on another base, or with another random init of the tensors it lacks.
        UnmaskError: The run's data or base cannot be loaded.
    """
    for step in steps:
        checkpoint_state(folder, step)  # refuses unreadable checkpoints before the model is loaded
    if not steps:
        return
    changes = {"output": str(folder.path)} | ({} if base is None else {"model": base})
    try:
        setup = set_up(build(read_yaml(folder.config) | changes), Console(quiet=True))
    except (ConfigError, DataError) as error:
        raise type(error)(
            f"the run in {str(folder.path)!r} cannot be set up again: {error} A relative path in {str(folder.config)!r} counts "
            "from the folder where the run was started: go there, or give the base with --base."
        ) from error
    own = SparseDelta.load(folder.delta) if folder.delta.is_file() else None
    evaluated = folder.evaluated()
    try:
        for step in steps:
            state = checkpoint_state(folder, step)
            try:
                setup.selection.load_state_dict(state)
            except SelectionError as error:
                raise ConfigError(
                    f"{str(folder.checkpoint(step))!r} does not fit the selection that {str(folder.config)!r} makes now, so "
                    f"the base {setup.config.model!r}, the data or the configuration are not those that the run started from. "
                    f"Give the run's base with --base. {error}"
                ) from error
            after = {"after": evaluated[step]} if step in evaluated else {}
            delta = setup.delta(checkpoint=folder.checkpoint(step).name, **after)
            if own is not None:  # the checkpoint's state does not show whether the base is the run's in all tensors
                comparable = delta.whole.keys() == own.whole.keys()  # otherwise a buffer has changed in between
                initial = [name for name in own.overlaid if name in delta.whole]
                same = all(same_bits(delta.whole[name], own.whole[name]) for name in initial)
                if not same or (comparable and delta.base != own.base):
                    raise DeltaError(
                        f"{setup.config.model!r} is not the base that the run in {str(folder.path)!r} started from, or the "
                        f"random init of what the base lacks is another here: {str(folder.delta)!r} says so. Give the run's "
                        "base with --base."
                    )
            yield step, delta
    finally:
        setup.selection.release()


def write_series(folder: RunFolder) -> list[tuple[int, int, Path]]:
    """Writes the delta of each whole checkpoint of a run, if it is not written yet, under ``series`` in the run's folder.

    Returns:
        The step, the number of weights unmasked by then, and the file of each delta, in the order of steps.
    """
    missing = [step for step, found in folder.steps().items() if found.whole and not folder.series_file(step).is_file()]
    for step, delta in deltas(folder, missing):
        delta.save(folder.series_file(step))
    loaded = [(SparseDelta.load(file).metadata, file) for file in folder.series.glob("step-*.safetensors")]
    for metadata, file in loaded:
        with refusing(DeltaError, repr(str(file)), "It does not belong to this run; move it elsewhere."):
            fields({"step": plain, "used": plain})(metadata, "its metadata")
    return sorted((metadata["step"], metadata["used"], file) for metadata, file in loaded)


def checkpoint_state(folder: RunFolder, step: int) -> dict[str, Any]:
    """Reads the selection's state from a checkpoint.

    Raises:
        ConfigError: The state is missing or damaged.
    """
    try:
        return read_state(folder.checkpoint(step) / STATE_FILE)
    except SelectionError as error:
        raise ConfigError(
            f"the checkpoint {str(folder.checkpoint(step))!r} cannot be used: {error} Take another one; "
            f"unmask delta {folder.path} --list shows them."
        ) from error
