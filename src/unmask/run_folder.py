"""The output folder of a run of ``unmask train``: what is in it, when it may be written, and going on after a stop."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from unmask.errors import ConfigError

_CLOCKS = ("runtime", "per_second", "preparation_time")  # endings of what the Trainer times in an evaluation


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

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.checkpoints / f"checkpoint-{step}"

    def series_file(self, step: int) -> Path:
        """The file of the delta that a step's checkpoint gives."""
        return self.series / f"step-{step}.safetensors"

    def steps(self) -> dict[int, bool]:
        """The steps that have a checkpoint, ascending, and whether it is whole.

        A checkpoint is whole if it holds a readable ``trainer_state.json``, which the Trainer writes last.
        """
        found = sorted(int(path.name.rpartition("-")[2]) for path in self.checkpoints.glob("checkpoint-*[0-9]"))
        return {step: _is_whole(self.checkpoint(step), step) for step in found}

    def whole_step(self, step: int | None) -> int:
        """The step itself, if its checkpoint is whole; for None, the last step that has a whole one.

        Raises:
            ConfigError: There is no such checkpoint, or a kill left it incomplete.
        """
        steps = self.steps()
        whole = [found for found, is_whole in steps.items() if is_whole]
        if step in whole or (step is None and whole):
            return whole[-1] if step is None else step
        if step in steps:
            what = f"{str(self.checkpoint(step))!r} is incomplete: the run was stopped while it was written"
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

    def check(self, resume: bool, overwrite: bool) -> str | None:
        """Whether a run may start here; touches nothing.

        Returns:
            The checkpoint to resume from; None to start anew.

        Raises:
            ConfigError: The folder holds a run already, or none to resume.
        """
        last = self._last()
        if resume:
            if last is None:
                raise ConfigError(
                    f"there is no checkpoint under {str(self.checkpoints)!r} to resume from; start without --resume."
                )
            return last
        if (self.delta.exists() or last) and not overwrite:
            raise ConfigError(
                f"{str(self.path)!r} already holds a run; give another --output, or --resume to continue it, or "
                "--overwrite."
            )
        return None

    def open(self, checkpoint: str | None) -> None:
        """Makes the folder ready: without what an earlier run left, or without metrics from after the checkpoint.

        Otherwise a new run that is stopped early would be resumed from the earlier run's checkpoint, and a killed run that
        is resumed would have some steps twice in its metrics.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            for made in (self.checkpoints, self.series):
                shutil.rmtree(made, ignore_errors=True)
            for file in (self.delta, self.summary, self.metrics, self.allocation):
                file.unlink(missing_ok=True)
            return
        step = int(checkpoint.rpartition("-")[2])
        for file in (self.metrics, self.allocation):
            if file.is_file():
                rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
                file.write_text("".join(row for row in rows if _step(row) <= step), encoding="utf-8")

    def how_to_go_on(self) -> str:
        """What to tell the user of an interrupted run."""
        last = self._last()
        if last is None:
            return "interrupted before the first checkpoint; nothing was saved. Start again with the same command."
        return f"interrupted; {last} is kept. Go on with: unmask train --config {self.config} --resume"

    def _last(self) -> str | None:
        return get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None


def _is_whole(checkpoint: Path, step: int) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == step)
    except (OSError, ValueError, KeyError):
        return False


def _step(row: str) -> float:
    """The step of a line of ``metrics.jsonl`` or ``allocation.jsonl``; infinite for a line that a kill cut short."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError):
        return float("inf")
