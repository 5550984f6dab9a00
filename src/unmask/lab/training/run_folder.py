"""Manages the output folder of a run of ``unmask train``: its files, its lock, and how a stopped run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.delta.delta import SparseDelta
from unmask.errors import ConfigError, UnmaskError, WriteError
from unmask.files import discard, sweep_up, write_text
from unmask.integrations.checkpoints import Checkpoint, differences, examine, folders, newest
from unmask.lab.training import locking
from unmask.lab.training.config import FREE, TrainConfig
from unmask.lab.training.settings import build, read_yaml, write_yaml
from unmask.reading import count, fields, mapping, number, read_json

_CLOCKS = ("runtime", "per_second", "preparation_time")  # endings of the clock times that an evaluation reports
_LENGTH = ("epochs", "max_steps", "batch_size", "accumulation", "data", "data_dir", "task")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # some network file systems report these


@dataclass(frozen=True)
class Start:
    """The place at which a run starts: a checkpoint, or the beginning if there is none.

    ``passed`` holds the newer checkpoints that are not whole, and ``summary`` the summary of a run that is finished.
    """

    checkpoint: Checkpoint | None = None
    passed: tuple[Checkpoint, ...] = ()
    summary: Mapping[str, Any] | None = None


class RunFolder:
    """The output folder of a run, with the paths of its files. The folder need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.summary = path / "config.yaml", path / "metrics.jsonl", path / "summary.json"
        self.delta, self.checkpoints = path / "delta.safetensors", path / "checkpoints"
        self.allocation, self.series = path / "allocation.jsonl", path / "series"
        self.ladder, self.rungs = path / "ladder.safetensors", path / "rungs"
        self._lock, self._overwriting = path / ".lock", path / ".overwriting"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, and keeps every other process out of it for the time of the context.

        Of processes that train together (torchrun), the first one holds the lock for all.

        Raises:
            ConfigError: Another process trains there, or the folder cannot be made.
            WriteError: A file in the folder could not be written during the context.
        """
        new = not self.path.exists()
        try:
            with contextlib.ExitStack() as stack:
                mine = True
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                    if locking.POSSIBLE and os.environ.get("RANK", "0") == "0":
                        mine = stack.enter_context(locking.holding(self._lock, keep=False))
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise ConfigError(
                            f"output = {str(self.path)!r} cannot be used: {error}. Give a folder that can be written to."
                        ) from error
                if not mine:
                    raise ConfigError(
                        f"{str(self.path)!r} is in use: {locking.holder(self._lock)} is training there. Wait for it to end, or "
                        "give another --output."
                    )
                yield
        except OSError as error:
            ours = Path(str(error.filename or "")).is_relative_to(self.path)
            if isinstance(error, UnmaskError) or not (ours or error.errno in _DISK):
                raise
            raise WriteError(
                f"a file of the run in {str(self.path)!r} cannot be written: {error}. {self.how_to_go_on()}"
            ) from error
        finally:
            if new:
                with contextlib.suppress(OSError):  # a refused run leaves no empty folder
                    self.path.rmdir()

    def checkpoint(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint."""
        return self.checkpoints / f"checkpoint-{step}"

    def series_file(self, step: int) -> Path:
        """Returns the file of the delta of a step's checkpoint."""
        return self.series / f"step-{step}.safetensors"

    def rung_file(self, step: int) -> Path:
        """Returns the file that holds the delta of a step until the ladder is written."""
        return self.rungs / f"step-{step}.safetensors"

    def steps(self) -> dict[int, Checkpoint]:
        """Examines all checkpoints, by step in ascending order; see `unmask.integrations.checkpoints`."""
        return {step: examine(path) for step, path in folders(self.checkpoints).items()}

    def newest(self) -> tuple[Checkpoint | None, list[Checkpoint]]:
        """Finds the newest whole checkpoint (None if there is none), and the newer ones, which are not whole."""
        return newest(self.checkpoints)

    def whole_step(self, step: int | None) -> int:
        """Returns the step, if its checkpoint is whole; for None, it returns the last step with a whole checkpoint.

        Raises:
            ConfigError: There is no such checkpoint, or it is not whole.
        """
        steps = self.steps()
        whole = [at for at, found in steps.items() if found.whole]
        if step in whole or (step is None and whole):
            return whole[-1] if step is None else step
        if step in steps:
            what = f"{str(self.checkpoint(step))!r} is not whole: {steps[step].fault}"
        else:
            what = f"{str(self.checkpoints)!r} holds no whole checkpoint" + ("" if step is None else f" of step {step}")
        there = f"; there are checkpoints of step {', '.join(map(str, whole))}" if whole else ""
        written = f"; deltas that were written before are in {str(self.series)!r}" if self.series.is_dir() else ""
        raise ConfigError(
            f"{what}{there}{written}. A run keeps all its checkpoints with --set save_steps=N --set keep_checkpoints=none."
        )

    def evaluated(self) -> dict[int, dict[str, float]]:
        """Reads the loss and the metrics of each evaluation of the run, by step and name, without clock times."""
        found: dict[int, dict[str, float]] = {}
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        for row in (json.loads(line) for line in lines if math.isfinite(_step(line))):
            metrics = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_")}
            metrics = {key: value for key, value in metrics.items() if not key.endswith(_CLOCKS)}
            if metrics:  # each of several splits has a row
                found.setdefault(row["step"], {}).update(metrics)
        return found

    def check(self, config: TrainConfig, resume: bool, overwrite: bool) -> Start:
        """Finds the place at which a run may start, and changes nothing in the folder.

        Raises:
            ConfigError: The folder holds a run already, or no run to resume, or a run with other settings.
        """
        if resume and self._overwriting.exists():
            raise ConfigError(
                f"an earlier --overwrite of the run in {str(self.path)!r} was stopped before it was complete, so there is "
                "nothing to resume. Start again with --overwrite."
            )
        if resume:
            summary = self._finished()
            whole, passed = (None, []) if summary is not None else self.newest()
            if summary is None and whole is None:
                faults = "; ".join(f"{str(found.path)!r}: {found.fault}" for found in passed)
                raise ConfigError(
                    f"there is no whole checkpoint to resume from ({faults}). Start again with --overwrite."
                    if passed
                    else f"there is no checkpoint under {str(self.checkpoints)!r} to resume from; start without --resume."
                )
            start = Start(whole, tuple(passed), summary)
            self.refuse_other_settings(config, start)
            return start
        if not overwrite and self._holds_a_run():
            raise ConfigError(
                f"{str(self.path)!r} already holds a run; give another --output, or --resume to continue it, or "
                "--overwrite."
            )
        return Start()

    def _holds_a_run(self) -> bool:
        made = (self.delta, self.summary, self._overwriting, *folders(self.checkpoints).values())
        return any(path.exists() for path in made)

    def _finished(self) -> Mapping[str, Any] | None:
        """Reads the summary, which a run writes last; None if it or the delta is missing or damaged."""
        form = fields({"steps": count, "before": mapping(number), "after": mapping(number)})
        try:
            summary: dict[str, Any] = form(read_json(self.summary), "the summary")
            SparseDelta.load(self.delta)
        except (OSError, ValueError):  # the run goes on from its last checkpoint and writes them again
            return None
        return summary

    def refuse_other_settings(self, config: TrainConfig, start: Start) -> None:
        """Refuses to resume a run with other settings than its own, and names each that is not ``auto``.

        Raises:
            ConfigError: Settings differ on which the delta depends.
        """
        sealed = None if start.checkpoint is None else (start.checkpoint.settings or {}).get("config")
        if sealed is None and not self.config.is_file():
            return
        was, now = dataclasses.asdict(build(sealed or read_yaml(self.config))), dataclasses.asdict(config)
        fixed = [name for name, value in now.items() if name not in FREE and value != "auto"]
        lines = differences({name: was[name] for name in fixed}, {name: now[name] for name in fixed})
        if not lines:
            return
        longer = ""
        if any(line.split(":")[0] in _LENGTH for line in lines):
            what = "learning rate falls" + (" and its budget is unmasked" if now["method"] == "id3" else "")
            longer = f" A longer run is another run from its first step on: its {what} over all the steps planned at its start."
        raise ConfigError(
            f"the run in {str(self.path)!r} was started with other settings than those given now (its own -> given now):\n  "
            + "\n  ".join(lines)
            + f"\nTo go on with it as it is: unmask train --config {self.config} --resume. To train with the new settings, start "
            f"another run, with another --output.{longer}"
        )

    def open(self, start: Start, config: TrainConfig) -> None:
        """Prepares the folder: removes the files of an earlier run, or the metrics of steps after the checkpoint.

        Otherwise a new run that is stopped early would be resumed from the earlier run's checkpoint, and a killed run that
        is resumed would have some steps twice in its metrics.
        """
        if start.checkpoint is None:
            if self._holds_a_run():  # from here on the earlier run cannot be resumed
                write_text(self._overwriting, "The earlier run here is being removed.\n")
            for made in (self.checkpoints, self.series, self.rungs):
                discard(made)
            for file in (self.delta, self.summary, self.metrics, self.allocation, self.config, self.ladder):
                file.unlink(missing_ok=True)
        else:
            for found in start.passed:
                discard(found.path)
            for file in (self.delta, self.summary):  # the run was finished, and one of the two was lost since
                file.unlink(missing_ok=True)
            for file in (self.metrics, self.allocation):
                if file.is_file():
                    rows = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                    write_text(file, "".join(row for row in rows if _step(row) <= start.checkpoint.step))
        for folder in (self.path, self.checkpoints, self.series, self.rungs):
            sweep_up(folder)
        write_yaml(config, self.config)
        self._overwriting.unlink(missing_ok=True)

    def how_to_go_on(self) -> str:
        """Tells the user of a stopped run how to go on."""
        whole, _ = self.newest()
        if whole is None:
            return "Nothing was saved before the first checkpoint. Start again with the same command."
        return f"{whole.path} is kept. Go on with: unmask train --config {self.config} --resume"


def _step(row: str) -> float:
    """Returns the step of a line of ``metrics.jsonl`` or ``allocation.jsonl``.

    The step is infinite for a line that a kill cut short, and for the last line of a run, which a resumed run writes again.
    """
    try:
        held = json.loads(row)
        return float("inf") if "train_runtime" in held else int(held["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
