"""The output folder of a run of ``unmask train``: what is in it, when it may be written, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from unmask.errors import ConfigError


class RunFolder:
    """Paths of a run's files.

    Args:
        path: The folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.summary = path / "config.yaml", path / "metrics.jsonl", path / "summary.json"
        self.delta, self.checkpoints = path / "delta.safetensors", path / "checkpoints"
        self.allocation = path / "allocation.jsonl"

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
            shutil.rmtree(self.checkpoints, ignore_errors=True)
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


def _step(row: str) -> float:
    """The step of a line of ``metrics.jsonl`` or ``allocation.jsonl``; infinite for a line that a kill cut short."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError):
        return float("inf")
