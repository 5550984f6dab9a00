"""The output folder of a run of ``unmask train``: what is in it, when it may be written, and going on after a stop."""

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
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.settings import build, read_yaml, write_yaml

_CLOCKS = ("runtime", "per_second", "preparation_time")  # endings of what the Trainer times in an evaluation
# what may be another in a run that goes on: the delta does not depend on it
FREE = (
    *("output", "eval_steps", "save_steps", "keep_checkpoints", "logging_steps", "report_to"),
    *("test_sets", "test_limit", "test_batch_size", "max_new_tokens"),
)
_LENGTH = ("epochs", "max_steps", "batch_size", "accumulation", "data", "data_dir", "task")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of some network file systems


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: The checkpoint that it goes on from; None for a run that starts anew, or is finished.
        passed: Newer checkpoints that are not whole.
        summary: The summary of a run that is finished already.
    """

    checkpoint: Checkpoint | None = None
    passed: tuple[Checkpoint, ...] = ()
    summary: Mapping[str, Any] | None = None

    @property
    def notes(self) -> list[str]:
        """What the user should know of it."""
        notes = [f"{str(found.path)!r} is passed over: {found.fault}" for found in self.passed]
        return notes + ([] if self.checkpoint is None or self.checkpoint.note is None else [self.checkpoint.note])


class RunFolder:
    """Paths of a run's files.

    Args:
        path: The folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.summary = path / "config.yaml", path / "metrics.jsonl", path / "summary.json"
        self.delta, self.checkpoints = path / "delta.safetensors", path / "checkpoints"
        self.allocation, self.series = path / "allocation.jsonl", path / "series"
        self._lock, self._overwriting = path / ".lock", path / ".overwriting"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps every other process out of the folder, and names what the disk refuses; makes the folder.

        Processes that train together (torchrun) hold it as one: the first of them does.

        Raises:
            ConfigError: Another process writes there, or no folder can be made there.
            WriteError: A file could not be written in the meantime.
        """
        new = not self.path.exists()
        try:
            with self._locked():
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
                with contextlib.suppress(OSError):  # what was refused leaves no empty folder
                    self.path.rmdir()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                locks = locking.POSSIBLE and os.environ.get("RANK", "0") == "0"
                mine = stack.enter_context(locking.holding(self._lock, keep=False)) if locks else True
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise ConfigError(
                        f"output = {str(self.path)!r} cannot be used: {error}. Give a folder that can be written to."
                    ) from error
                mine = True
            if not mine:
                raise ConfigError(
                    f"{str(self.path)!r} is in use: {locking.holder(self._lock)} is training there. Wait for it to end, or give "
                    "another --output."
                )
            yield

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.checkpoints / f"checkpoint-{step}"

    def series_file(self, step: int) -> Path:
        """The file of the delta that a step's checkpoint gives."""
        return self.series / f"step-{step}.safetensors"

    def steps(self) -> dict[int, Checkpoint]:
        """The steps that have a checkpoint, ascending, and whether each is whole; see `unmask.integrations.checkpoints`."""
        return {step: examine(path) for step, path in folders(self.checkpoints).items()}

    def newest(self) -> tuple[Checkpoint | None, list[Checkpoint]]:
        """The newest whole checkpoint, None for none, and the newer ones, which are not whole."""
        return newest(self.checkpoints)

    def whole_step(self, step: int | None) -> int:
        """The step itself, if its checkpoint is whole; for None, the last step that has a whole one.

        Raises:
            ConfigError: There is no such checkpoint, or a kill left it incomplete.
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
        """The loss and the metrics by name of each evaluation along the run, by step; clock times are left out."""
        found: dict[int, dict[str, float]] = {}
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        for row in (json.loads(line) for line in lines if math.isfinite(_step(line))):
            metrics = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_")}
            metrics = {key: value for key, value in metrics.items() if not key.endswith(_CLOCKS)}
            if metrics:  # several splits have a row each
                found.setdefault(row["step"], {}).update(metrics)
        return found

    def check(self, config: TrainConfig, resume: bool, overwrite: bool) -> Start:
        """Whether a run may start here, and where; touches nothing.

        Raises:
            ConfigError: The folder holds a run already, or none to resume, or one of other settings.
        """
        if resume and self._overwriting.exists():
            raise ConfigError(
                f"the earlier run in {str(self.path)!r} was being overwritten when that was stopped, so there is nothing to "
                "resume. Start again with --overwrite."
            )
        if resume:
            start = self._where_it_stopped()
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

    def _where_it_stopped(self) -> Start:
        summary = self._finished()
        if summary is not None:
            return Start(summary=summary)
        whole, passed = self.newest()
        if whole is not None:
            return Start(whole, tuple(passed))
        if passed:
            faults = "; ".join(f"{str(found.path)!r}: {found.fault}" for found in passed)
            raise ConfigError(f"there is no whole checkpoint to resume from ({faults}). Start again with --overwrite.")
        raise ConfigError(
            f"there is no checkpoint under {str(self.checkpoints)!r} to resume from; start without --resume."
        )

    def _finished(self) -> Mapping[str, Any] | None:
        """The summary, which a run writes last, if it and the delta are whole."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
            SparseDelta.load(self.delta)
        except (OSError, ValueError, RecursionError):  # not there, or damaged: made again from the last checkpoint
            return None
        whole = isinstance(summary, dict) and isinstance(summary.get("steps"), int)
        scored = whole and all(_are_numbers(summary.get(key)) for key in ("before", "after"))
        return summary if scored else None

    def refuse_other_settings(self, config: TrainConfig, start: Start) -> None:
        """Refuses to go on with other settings than the run's own, each of which is named.

        Settings that are ``auto`` yet are not compared.

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
        what = "learning rate falls" + (" and its budget is unmasked" if now["method"] == "id3" else "")
        longer = (
            f" A longer run is another run from its first step on: its {what} over all the steps planned at its start."
        )
        raise ConfigError(
            f"the run in {str(self.path)!r} was started with other settings than those given now (its own -> given now):\n  "
            + "\n  ".join(lines)
            + f"\nTo go on with it as it is: unmask train --config {self.config} --resume. To train with the new settings, start "
            "a run of its own: another --output."
            + (longer if any(line.split(":")[0] in _LENGTH for line in lines) else "")
        )

    def open(self, start: Start, config: TrainConfig) -> None:
        """Makes the folder ready: without what an earlier run left, or without metrics from after the checkpoint.

        Otherwise a new run that is stopped early would be resumed from the earlier run's checkpoint, and a killed run that
        is resumed would have some steps twice in its metrics.
        """
        if start.checkpoint is None:
            if self._holds_a_run():  # from here on none of it is resumed
                write_text(self._overwriting, "The earlier run here is being removed.\n")
            for made in (self.checkpoints, self.series):
                discard(made)
            for file in (self.delta, self.summary, self.metrics, self.allocation, self.config):
                file.unlink(missing_ok=True)
        else:
            for found in start.passed:
                discard(found.path)
            for file in (self.delta, self.summary):  # of the run when it was finished, and then lost one of them
                file.unlink(missing_ok=True)
            for file in (self.metrics, self.allocation):
                if file.is_file():
                    rows = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                    write_text(file, "".join(row for row in rows if _step(row) <= start.checkpoint.step))
        for folder in (self.path, self.checkpoints, self.series):
            sweep_up(folder)
        write_yaml(config, self.config)
        self._overwriting.unlink(missing_ok=True)

    def how_to_go_on(self) -> str:
        """What to tell the user of a run that stopped."""
        whole, _ = self.newest()
        if whole is None:
            return "Nothing was saved before the first checkpoint. Start again with the same command."
        return f"{whole.path} is kept. Go on with: unmask train --config {self.config} --resume"


def _are_numbers(metrics: Any) -> bool:
    return isinstance(metrics, dict) and all(isinstance(value, int | float) for value in metrics.values())


def _step(row: str) -> float:
    """The step of a line of ``metrics.jsonl`` or ``allocation.jsonl``.

    Infinite for a line that a kill cut short, and for the one that ends a run, which comes again when it goes on.
    """
    try:
        held = json.loads(row)
        return float("inf") if "train_runtime" in held else int(held["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
