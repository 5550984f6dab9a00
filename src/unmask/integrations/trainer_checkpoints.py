"""Makes the checkpoints of transformers' Trainer whole or not there: each has a manifest, and a resumed run is checked by it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from unmask.errors import SelectionError, UnmaskError, WriteError
from unmask.files import discard
from unmask.integrations.checkpoints import STATE_FILE, Checkpoint, differences, examine, newest, rotate, seal
from unmask.selection.selection import Selection
from unmask.selection.state import read_state


class WholeCheckpoints(TrainerCallback):
    """Makes the checkpoints of any Trainer whole or not there: ``trainer.add_callback(WholeCheckpoints(trainer))``.

    Every `SelectiveCallback` is one. Give one to a Trainer that trains a PEFT adapter, ours or another. From then on:

    - Each checkpoint gets a ``manifest.json``, written last: it names each file with its size and SHA-256, and the step.
    - ``save_total_limit`` removes an older checkpoint only when the new one is whole, so a kill or a full disk at any moment
      leaves the last whole one.
    - ``train(resume_from_checkpoint=True)`` takes the newest whole one, and warns of those that it passes over. A checkpoint
      that is damaged, or mixed from several, is refused.
    - A run that is resumed at its last step takes no further step.

    Args:
        trainer: The Trainer, built.

    Attributes:
        settings: JSON values that go into each manifest.
        resumed: The checkpoint from which the present ``train()`` goes on; None if there is none.

    Raises:
        SelectionError: From ``train(resume_from_checkpoint=...)``: the checkpoint is not whole, or it lies beyond the run's
            last step.
        WriteError: From ``train()``: a checkpoint cannot be written; earlier ones are kept.
    """

    # The Trainer's methods that are replaced by those of the callback; the callback's have a leading underscore each.
    _replaced: tuple[str, ...] = ("train", "set_initial_training_values", "_save_checkpoint", "_load_from_checkpoint")

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.settings: Mapping[str, Any] = {}
        self.resumed: Checkpoint | None = None
        self._planned = 0  # T
        self._originals = {name: getattr(trainer, name) for name in self._replaced}
        for name in self._replaced:
            setattr(trainer, name, getattr(self, f"_{name.removeprefix('_')}"))

    def remember(self, path: str) -> None:
        """Makes a checkpoint the one from which ``train()`` goes on.

        Raises:
            SelectionError: The checkpoint is not whole.
        """
        found = examine(Path(path))
        if not found.whole:
            raise SelectionError(
                f"{path!r} cannot be resumed from: {found.fault}. Take another checkpoint; resume_from_checkpoint=True takes "
                "the newest whole one."
            )
        if found.note:
            warnings.warn(found.note, stacklevel=2)
        self.resumed = found

    def _train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self.resumed = None
        if resume_from_checkpoint is True:
            folder = Path(str(self.trainer.args.output_dir))
            whole, passed = newest(folder)
            if whole is None:
                faults = "".join(f"; {str(found.path)!r}: {found.fault}" for found in passed)
                raise SelectionError(
                    f"there is no whole checkpoint in {str(folder)!r} to resume from{faults}. Call train() without "
                    "resume_from_checkpoint."
                )
            for found in passed:
                warnings.warn(f"{str(found.path)!r} is passed over: {found.fault}", stacklevel=3)
            resume_from_checkpoint = str(whole.path)
        return self._originals["train"](resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self.remember(resume_from_checkpoint)
        self._originals["_load_from_checkpoint"](resume_from_checkpoint, *args, **kwargs)

    def _set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the number of steps: this is the first moment at which the Trainer knows it."""
        values = self._originals["set_initial_training_values"](*args, **kwargs)
        self._planned, an_epoch = int(values[-1]), int(values[1])
        if self.resumed is None or self.resumed.step < self._planned:
            return values
        if self.resumed.step > self._planned:
            raise SelectionError(
                f"{str(self.resumed.path)!r} was saved at step {self.resumed.step:,}, and the run has {self._planned:,} steps. "
                "Resume with the settings that the run was started with."
            )
        return (self.resumed.step // an_epoch, *values[1:])  # With no epoch left the Trainer takes no further step.

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Writes a checkpoint, seals it, and only then lets older ones go."""
        trainer, given = self.trainer, self.trainer.args
        parent = Path(trainer._get_output_dir(trial=kwargs.get("trial", args[1] if len(args) > 1 else None)))
        folder, limit = parent / f"checkpoint-{trainer.state.global_step}", given.save_total_limit
        if given.should_save:
            discard(folder)  # a killed run or an earlier one may have left it
        trainer.accelerator.wait_for_everyone()
        given.save_total_limit = None  # otherwise the Trainer removes older ones before this one is whole
        try:
            with _writing(folder):
                self._originals["_save_checkpoint"](*args, **kwargs)
        finally:
            given.save_total_limit = limit
        trainer.accelerator.wait_for_everyone()  # each other process writes the state of its RNG
        if not given.should_save:
            return
        with _writing(folder):
            if (folder / TRAINING_ARGS_NAME).exists():
                torch.save(given, folder / TRAINING_ARGS_NAME)  # again, with the user's limit
            seal(folder, trainer.state.global_step, {**self.settings, "planned_steps": self._planned})
        rotate(parent, folder, limit, trainer.state.best_model_checkpoint)


def state_to_resume(checkpoint: Checkpoint, selection: Selection, steps: int) -> dict[str, Any]:
    """Reads the state that ``selection`` will load from a whole checkpoint, and refuses one of another budget or method.

    ``steps`` is the number of steps that the Trainer has planned now.
    """
    state = read_state(checkpoint.path / STATE_FILE)
    present = {"budget": selection.budget, "method": selection.method.describe()}
    lines = differences({key: state.get(key) for key in present}, present)
    if not lines:
        return state
    planned = (checkpoint.settings or {}).get("planned_steps", steps)
    lengths = growing = ""
    if planned != steps:
        lengths = f" It was planned for {planned:,} steps, and this run for {steps:,}."
        if selection.method.strategy == "increment":
            growing = (
                " A method that unmasks step by step spreads its budget over the steps planned, so a longer or shorter run is "
                "another run from its first step on: train it from the start, or fix the method's steps yourself "
                f"(unmask.id3(budget, steps={planned})), and further steps train the full budget."
            )
    raise SelectionError(
        f"{str(checkpoint.path)!r} is the checkpoint of another run (its own -> given now): {'; '.join(lines)}.{lengths} "
        f"Resume with the settings that the run was started with.{growing}"
    )


@contextmanager
def _writing(checkpoint: Path) -> Iterator[None]:
    """Removes the checkpoint if it cannot be written to its end, and turns the error into a `WriteError`."""
    try:
        yield
    except UnmaskError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
        with suppress(OSError):
            discard(checkpoint)
        raise WriteError(
            f"the checkpoint {str(checkpoint)!r} cannot be written ({error}), so training stopped. Earlier checkpoints are "
            "kept: make room, and resume from them."
        ) from error
