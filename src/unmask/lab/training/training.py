"""Runs ``unmask train``: it trains a selection with transformers' Trainer, evaluates it, and writes the output folder."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from unmask.distributed.processes import is_main, launched
from unmask.errors import ConfigError, UnmaskError
from unmask.files import check_folder, write_json
from unmask.integrations.checkpoints import Checkpoint, differences
from unmask.integrations.trainer import SelectiveTrainer
from unmask.lab.models import quiet
from unmask.lab.tasks.registry import kind_for
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.ladder import RungFiles
from unmask.lab.training.progress import AllocationFile, LiveProgress, MetricsFile, StopOnInterrupt
from unmask.lab.training.run_folder import RunFolder
from unmask.lab.training.setup import Setup, in_words, optimizer_from, print_notes, set_up, with_rates
from unmask.reading import choices


class InterruptedRunError(UnmaskError):
    """The run was stopped by Ctrl-C; its last checkpoint is kept."""


@dataclass(frozen=True)
class Outcome:
    """The results of a run: metrics before and after training, the delta's path, and what ``summary.json`` holds."""

    before: dict[str, float]
    after: dict[str, float]
    delta: Path
    summary: dict[str, Any]


def train(
    config: TrainConfig, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Outcome:
    """Trains, and writes the delta, the resolved configuration, the metrics and a summary into ``config.output``.

    Args:
        config: The run's configuration.
        resume: If True, the run continues from the last whole checkpoint in ``config.output``. A finished run is left as it is.
        overwrite: If True, the run starts from the beginning although ``config.output`` holds a run.
        console: The console on which the run reports; None is standard output.

    Returns:
        The run's results. Of several processes the first writes files and reports; the summary of the others is ``{}``.

    Raises:
        ConfigError: The output folder holds a run already, or no run to resume, or a run with other settings; or another
            process trains there.
        InterruptedRunError: The user pressed Ctrl-C; the last checkpoint is kept.
        WriteError: The disk is full, or a file cannot be written; the last checkpoint is kept.
        UnmaskError: The run cannot work for another reason; the message says what to do.
    """
    console = console or Console(quiet=not is_main())
    _check_loggers(config.report_to)
    folder = RunFolder(check_folder(config.output))
    with folder.held():
        start = folder.check(config, resume, overwrite)
        if start.summary is not None:
            summary = dict(start.summary)
            console.print(
                f"the run in {str(folder.path)!r} is finished: {summary['steps']:,} steps, nothing is left to do\n"
                f"after:  {in_words(summary['after'])}\n"
                f"delta:  {folder.delta} ({folder.delta.stat().st_size:,} bytes)"
            )
            return Outcome(summary["before"], summary["after"], folder.delta, summary)
        print_notes(console, [f"{str(found.path)!r} is passed over: {found.fault}" for found in start.passed])
        if start.checkpoint is not None and start.checkpoint.note is not None:
            print_notes(console, [start.checkpoint.note])
        try:
            run = _Run(set_up(config, console), folder, console)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted before training started; {config.output!r} is as it was. Start again with the same command."
            ) from None
        if start.checkpoint is not None:
            folder.refuse_other_settings(run.config, start)
            sealed = start.checkpoint.settings or {}
            names = [name for name in ("steps", "examples", "data") if name in sealed]
            lines = differences({name: sealed[name] for name in names}, {name: run.settings[name] for name in names})
            if lines:
                raise ConfigError(
                    f"the training data are not those that {str(start.checkpoint.path)!r} was trained on (then -> now): "
                    f"{'; '.join(lines)}. Bring the data back, or start another run with another --output."
                )
        try:
            if is_main():
                folder.open(start, run.config)
            return run.go(start.checkpoint)
        except KeyboardInterrupt:  # `StopOnInterrupt` handles it during the steps
            raise InterruptedRunError(f"interrupted. {folder.how_to_go_on()}") from None


def _check_loggers(names: Sequence[str]) -> None:
    """Refuses a logger that transformers does not know, or whose package is not installed.

    Raises:
        ConfigError: A name is such a logger's.
    """
    here = get_available_reporting_integrations()
    for name in [] if tuple(names) == ("all",) else names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to = {name!r}; it must be of {choices(name, INTEGRATION_TO_CALLBACK)}.")
        if name not in here:
            raise ConfigError(f"report_to = {name!r}: its package is not installed. Install it, or leave it out.")


class _Run:
    """A run: the Trainer with its callbacks, and the steps from the first evaluation to the summary."""

    def __init__(self, setup: Setup, folder: RunFolder, console: Console) -> None:
        model: PreTrainedModel = setup.base.model
        prepared, selection, head = setup.prepared, setup.selection, set(setup.base.head)
        self.setup, self.prepared, self.selection = setup, prepared, selection
        self.folder, self.console = folder, console
        self.head = sum(p.numel() for name, p in model.named_parameters() if name in head)
        self.total = sum(p.numel() for p in model.parameters())
        self.config = config = with_rates(setup.config, selection, self.total, head)
        self.interrupt = StopOnInterrupt()
        self.progress = LiveProgress(selection, prepared.step_metric, console)
        self.metrics = MetricsFile(folder.metrics, selection)
        writing: list[TrainerCallback] = [self.progress, self.metrics, AllocationFile(folder.allocation, selection)]
        self.rungs = None if config.ladder is None else RungFiles(setup, folder, config.ladder)
        if self.rungs is not None:
            writing.append(self.rungs)
        # Up to 64 evenly spaced examples tell whether a resumed run has the same training data.
        examples: Any = prepared.train_set
        sample = [examples[i] for i in range(0, len(examples), max(1, math.ceil(len(examples) / 64)))]
        data = json.dumps(sample, default=lambda value: value.tolist(), sort_keys=True)
        self.settings = {
            "config": asdict(config),
            "steps": setup.steps,
            "examples": len(examples),
            "data": hashlib.sha256(data.encode()).hexdigest()[:16],
        }
        sets = dict(prepared.step_sets)
        with quiet():
            self.trainer = SelectiveTrainer(
                model=model,
                selection=selection,
                settings=self.settings,
                args=_arguments(config, setup.steps, folder, bool(sets)),
                train_dataset=prepared.train_set,
                eval_dataset=sets.get("", sets or None),
                data_collator=prepared.collate,
                compute_metrics=prepared.step_metrics,
                preprocess_logits_for_metrics=prepared.reduce_logits,
                optimizers=(optimizer_from(config, selection, head), None),
                callbacks=[self.interrupt, *(writing if is_main() else [])],
            )
        self.trainer.remove_callback(ProgressCallback)
        self.trainer.remove_callback(PrinterCallback)

    def go(self, checkpoint: Checkpoint | None) -> Outcome:
        """Evaluates, trains from the checkpoint or from the start, evaluates again, and writes the result."""
        before = self.prepared.evaluate(self.trainer, "before")
        self._report_start(before)
        if checkpoint:
            self.console.print(f"continuing from {checkpoint.path}")
        elif is_main():
            self.metrics.start(before)
        start = time.perf_counter()
        try:
            self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
        except KeyboardInterrupt:
            self.interrupt.interrupted = True
        finally:
            self.progress.stop()
            self.interrupt.restore()
        if self.interrupt.interrupted:
            raise InterruptedRunError(f"interrupted. {self.folder.how_to_go_on()}")
        seconds = time.perf_counter() - start
        return self._finish(before, self.prepared.evaluate(self.trainer, "after"), seconds)

    def _report_start(self, before: dict[str, float]) -> None:
        selection, total, config = self.selection, self.total, self.config
        extra = f", and {selection.dense_numel:,} outside the budget (dense)" if selection.dense_numel else ""
        apart = f" (dense {config.dense_lr:.3g})" if extra and config.dense_lr not in (None, config.lr) else ""
        self.console.print(
            f"{selection.method.name}: {selection.budget:,} of {total:,} weights ({selection.budget / total:.3%}){extra}; "
            f"{self.setup.steps:,} steps of {config.batch_size * config.accumulation * launched()}, lr {config.lr:.3g}{apart}"
        )
        self.console.print("before: " + in_words(before))

    def _finish(self, before: dict[str, float], after: dict[str, float], seconds: float) -> Outcome:
        if not is_main():
            self.selection.release()
            return Outcome(before, after, self.folder.delta, {})
        delta = self.setup.delta(after=after)
        path = delta.save(self.folder.delta)
        ladder = None if self.rungs is None else self.rungs.finish(delta)
        main = self.prepared.main_metric
        summary = {
            "task": self.setup.task,
            "main_metric": main,
            "main": after[main],
            "greater_is_better": self.prepared.greater_is_better,
            "method": self.selection.method.describe(),
            "budget": self.selection.budget,
            "used": self.selection.used,
            "dense": self.selection.dense_numel,
            "head": self.head,
            "parameters": self.total,
            "steps": self.selection.step,
            "seconds": round(seconds, 2),
            "before": before,
            "after": after,
            "delta_bytes": path.stat().st_size,
            "delta_weights": len(delta),
            "into": delta.metadata.get("into"),
            "seed": self.config.seed,
            "lr": self.config.lr,
            "bias_correction": self.config.bias_correction,
        }
        write_json(self.folder.summary, summary, indent=2)
        self.console.print("after:  " + in_words(after))
        self.console.print(f"delta:  {path} ({path.stat().st_size:,} bytes)")
        if ladder is not None:
            self.console.print(f"ladder: {ladder} ({ladder.stat().st_size:,} bytes)")
        self.selection.release()
        return Outcome(before, after, path, summary)


def _arguments(config: TrainConfig, steps: int, folder: RunFolder, evaluates: bool) -> TrainingArguments:
    along = "epoch" if config.eval_steps is None else "steps"
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=kind_for(config.task).eval_batches * config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=cast(float, config.lr),  # `with_rates` has replaced "auto"
        warmup_steps=math.ceil(config.warmup * steps),
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=config.seed,
        eval_strategy=along if evaluates else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps or config.eval_steps else "epoch",
        save_steps=config.save_steps or config.eval_steps or 500,
        save_total_limit=config.keep_checkpoints,
        logging_steps=config.logging_steps,
        report_to=list(config.report_to) or "none",
        # If True, the Trainer multiplies the loss by the number of processes. Only the loss of generation counts tokens.
        average_tokens_across_devices=kind_for(config.task).head == "generation",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
