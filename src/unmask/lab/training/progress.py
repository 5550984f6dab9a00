"""Callbacks of a run: a live line, the files of metrics and of the allocation, and the reaction to Ctrl-C."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from unmask.analysis import snapshot
from unmask.files import append_json
from unmask.selection.selection import Selection


class LiveProgress(TrainerCallback):
    """A progress bar with the loss, the unmasked share of the budget, and the last metric."""

    def __init__(self, selection: Selection, metric: str, console: Console) -> None:
        self._selection, self._metric = selection, metric
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} · unmasked {task.fields[used]} · {task.fields[metric]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", total=1, loss="-", used="-", metric=f"{metric} -")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        kept = self._selection.method.leaving == "kept"  # the number of weights ever trained exceeds the budget
        used, budget = self._selection.used, self._selection.budget
        shown = f"{used:,} at {budget:,} a step" if kept else f"{used:,} of {budget:,}"
        self._bar.update(self._task, completed=state.global_step, used=shown)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._bar.update(self._task, loss=f"{float(logs['loss']):.4f}")
        if f"eval_{self._metric}" in logs:
            self._bar.update(self._task, metric=f"{self._metric} {float(logs[f'eval_{self._metric}']):.4f}")

    def stop(self) -> None:
        """Ends the live line, if it is still shown."""
        self._bar.stop()


class MetricsFile(TrainerCallback):
    """Appends every log of the Trainer to ``metrics.jsonl``, with the selection's state at that step.

    The rows with keys that begin with ``eval_`` form the run's curve. They hold ``step``, ``used`` (the number of weights
    unmasked by then), and the loss and metrics of the evaluation as ``eval_loss``, ``eval_accuracy`` and so on. With several
    splits, the keys contain the split's name (``eval_dev_loss``), and each split has a row; step 0 has one row for all.
    """

    def __init__(self, path: Path, selection: Selection) -> None:
        self._path, self._selection = path, selection

    def start(self, before: Mapping[str, float]) -> None:
        """Writes the first point of the curve: the metrics before training, at step 0."""
        point = {f"eval_{name}": value for name, value in before.items()}
        append_json(self._path, {"step": 0, "epoch": 0, "used": 0, **point})

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        row = {"step": state.global_step, "epoch": state.epoch, "used": self._selection.used, **(logs or {})}
        append_json(self._path, row)


class AllocationFile(TrainerCallback):
    """Appends the places of the unmasked weights (`unmask.analysis.snapshot`) to ``allocation.jsonl``.

    It does so after the first step, with every evaluation, and at the end. A step has one line at most.
    """

    def __init__(self, path: Path, selection: Selection) -> None:
        self._path, self._selection = path, selection
        self._written = -1

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._path.is_file():  # the run is resumed, and its checkpoint's step may have a line already
            lines = self._path.read_text(encoding="utf-8").splitlines()
            self._written = json.loads(lines[-1])["step"] if lines else -1

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 1 or state.global_step == state.max_steps:
            self._append()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._append()

    def _append(self) -> None:
        if self._selection.step not in (0, self._written):
            self._written = self._selection.step
            append_json(self._path, snapshot(self._selection))


class StopOnInterrupt(TrainerCallback):
    """Stops a run at Ctrl-C: the first saves after the step, and sets ``interrupted``; the second stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._before = signal.signal(signal.SIGINT, self._on_signal)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def restore(self) -> None:
        """Restores the handler of Ctrl-C that was there before."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self.restore()
