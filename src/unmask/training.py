"""The run that a command-line user gets: a task, a base model, a selection, transformers' Trainer underneath."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from unmask.config import TrainConfig, write_yaml
from unmask.delta import SparseDelta
from unmask.errors import ConfigError, UnmaskError
from unmask.integrations.transformers import SelectiveTrainer
from unmask.into import Inserted, insert, require
from unmask.modeling import describe_task, load_base, longest_input, quiet
from unmask.optim import BiasCorrection, SelectiveAdamW
from unmask.presets import into_from, method_from
from unmask.progress import LiveProgress, MetricsFile, StopOnInterrupt
from unmask.scopes import exactly
from unmask.selecting import select
from unmask.selection import Selection
from unmask.tasks import compute, load_files, load_glue
from unmask.tasks.data import Examples, TaskData

CHECKPOINTS = "checkpoints"


class InterruptedRunError(UnmaskError):
    """The run was stopped by Ctrl-C; its last checkpoint is kept."""


@dataclass(frozen=True)
class Outcome:
    """What a run left behind; also written to ``summary.json``.

    Attributes:
        before: Metrics of each evaluation split before training.
        after: The same afterwards.
        delta: Path of the delta.
        summary: Everything reported, as JSON values.
    """

    before: dict[str, float]
    after: dict[str, float]
    delta: Path
    summary: dict[str, Any]


class Encoded(Dataset):
    """Tokenized examples: ``input_ids``, ``attention_mask`` ... and ``labels``, unpadded."""

    def __init__(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, regression: bool
    ) -> None:
        self._inputs = tokenizer(examples.texts, examples.pairs, truncation=True, max_length=max_length)
        self._labels = [float(label) if regression else int(label) for label in examples.labels]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: values[index] for key, values in self._inputs.items()} | {"labels": self._labels[index]}


def load_data(config: TrainConfig) -> TaskData:
    """The run's task: a GLUE task, the user's own files, or a hub data set."""
    if config.task is not None:
        return load_glue(config.task, config.data_dir)
    assert config.data is not None, "checked by TrainConfig"
    return load_files(config.data, config.eval, config.text, config.label, config.text_pair)


def planned_steps(config: TrainConfig, examples: int) -> int:
    """T, the number of optimizer steps: ``max_steps``, or what the epochs make (an epoch's rest is a step of its own).

    Example:
        >>> planned_steps(TrainConfig(model="m", output="o", task="rte", budget="1%", epochs=2, batch_size=8), 100)
        26
    """
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(examples / config.batch_size)
    return math.ceil(config.epochs * math.ceil(batches / config.accumulation))


def train(
    config: TrainConfig, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Outcome:
    """Trains, and writes the delta, the resolved configuration, the metrics and a summary into ``config.output``.

    Args:
        config: The run.
        resume: Continue from the last checkpoint in ``config.output``.
        overwrite: Start anew although ``config.output`` holds a run.
        console: Where to report; None for standard output.

    Raises:
        ConfigError: The output folder holds a run already, or none to resume.
        InterruptedRunError: Ctrl-C; the last checkpoint is kept.
        UnmaskError: Any other refusal, with what to do.
    """
    console = console or Console()
    output, into = Path(config.output), into_from(config)
    if into is not None:
        require(into)
    checkpoint = _prepare_output(output, resume, overwrite)
    data = load_data(config)
    for note in data.notes:
        console.print(f"note: {note}")
    model, tokenizer, missing = load_base(config.model, data.spec.num_labels, config.seed)
    output.mkdir(parents=True, exist_ok=True)
    write_yaml(config, output / "config.yaml")
    # the base itself: the budget's scope is the method's, and all that the checkpoint lacks is a head
    base = Inserted(model, [], missing, missing) if into is None else insert(model, into, missing, config.seed)
    return _Run(config, data, base, tokenizer, console).go(checkpoint)


def _prepare_output(output: Path, resume: bool, overwrite: bool) -> str | None:
    checkpoints = output / CHECKPOINTS
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if resume:
        if last is None:
            raise ConfigError(
                f"there is no checkpoint under {str(checkpoints)!r} to resume from; start without --resume."
            )
        return last
    held = output / "delta.safetensors"
    if (held.exists() or last) and not overwrite:
        raise ConfigError(
            f"{str(output)!r} already holds a run; give another --output, or --resume to continue it, or --overwrite."
        )
    return None


class _Run:
    """One training run in the making: everything that `train` composes."""

    def __init__(
        self,
        config: TrainConfig,
        data: TaskData,
        base: Inserted,
        tokenizer: PreTrainedTokenizerBase,
        console: Console,
    ) -> None:
        model: PreTrainedModel = base.model
        self.config, self.data, self.model, self.console = config, data, model, console
        self.output = Path(config.output)
        self.collate = DataCollatorWithPadding(tokenizer)
        regression = data.spec.num_labels == 1
        self.max_length = longest_input(model, tokenizer, config.max_length)
        if self.max_length < config.max_length:
            console.print(
                f"note: inputs are cut at the {self.max_length} tokens that {config.model} has positions for."
            )
        self.train_set = Encoded(data.train, tokenizer, self.max_length, regression)
        self.eval_sets = {k: Encoded(v, tokenizer, self.max_length, regression) for k, v in data.evals.items()}
        self.steps = planned_steps(config, len(self.train_set))
        set_seed(config.seed)
        if config.gradient_checkpointing:
            # transformers 5.23 renamed it; 4.57 has the old name alone
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.selection = self._select(base)
        self.interrupt = StopOnInterrupt()
        self.progress = LiveProgress(self.selection, self._live_metric(), console)
        with quiet():
            self.trainer = self._trainer()

    def go(self, checkpoint: str | None) -> Outcome:
        before = self._evaluate()
        self._report_start(before)
        if checkpoint:
            self.console.print(f"continuing from {checkpoint}")
        start = time.perf_counter()
        try:
            self.trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            self.interrupt.interrupted = True
        finally:
            self.progress.stop()
            self.interrupt.restore()
        if self.interrupt.interrupted:
            raise InterruptedRunError(self._how_to_go_on())
        seconds = time.perf_counter() - start
        return self._finish(before, self._evaluate(), seconds)

    def _select(self, base: Inserted) -> Selection:
        config = self.config
        head = exactly(base.head)
        dense = [p for given in config.dense for p in (head if given == "new" else [given])]
        loader = DataLoader(self.train_set, config.batch_size, shuffle=True, collate_fn=self.collate)
        return select(
            self.model,
            method_from(config, self.steps, loader),
            include=config.include or exactly(base.added) or None,
            exclude=config.exclude or None,
            dense=dense or None,
            new=exactly(base.new),
        )

    def _trainer(self) -> SelectiveTrainer:
        config = self.config
        optimizer = SelectiveAdamW(
            self.selection.parameters(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            bias_correction=cast(BiasCorrection, config.bias_correction),  # checked by TrainConfig
        )
        eval_strategy = "epoch" if config.eval_steps is None else "steps"
        arguments = TrainingArguments(
            output_dir=str(self.output / CHECKPOINTS),
            max_steps=self.steps,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=4 * config.batch_size,
            gradient_accumulation_steps=config.accumulation,
            learning_rate=config.lr,
            warmup_steps=math.ceil(config.warmup * self.steps),
            max_grad_norm=config.max_grad_norm,
            bf16=config.bf16,
            use_cpu=not torch.accelerator.is_available(),
            seed=config.seed,
            eval_strategy=eval_strategy,
            eval_steps=config.eval_steps,
            save_strategy="steps" if config.save_steps or config.eval_steps else "epoch",
            save_steps=config.save_steps or config.eval_steps or 500,
            save_total_limit=2,
            logging_steps=config.logging_steps,
            report_to=list(config.report_to) or "none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = SelectiveTrainer(
            model=self.model,
            selection=self.selection,
            args=arguments,
            train_dataset=self.train_set,
            eval_dataset=self._eval_argument(),
            data_collator=self.collate,
            compute_metrics=self._metrics,
            optimizers=(optimizer, None),
            callbacks=[self.progress, MetricsFile(self.output / "metrics.jsonl", self.selection), self.interrupt],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _eval_argument(self) -> Any:
        return self.eval_sets if len(self.eval_sets) > 1 else next(iter(self.eval_sets.values()))

    def _live_metric(self) -> str:
        first = next(iter(self.eval_sets))
        return self.data.spec.main_metric if len(self.eval_sets) == 1 else f"{first}_{self.data.spec.main_metric}"

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return compute(self.data.spec, prediction.predictions, prediction.label_ids)

    def _evaluate(self) -> dict[str, float]:
        """Main and further metrics of every split, from the Trainer's own prediction loop."""
        result: dict[str, float] = {}
        for name, examples in self.eval_sets.items():
            prediction = self.trainer.predict(examples, metric_key_prefix="x")  # type: ignore[arg-type]
            prefix = f"{name}_" if len(self.eval_sets) > 1 else ""
            metrics = compute(self.data.spec, prediction.predictions, prediction.label_ids)
            result |= {prefix + key: value for key, value in metrics.items()}
            result[f"{prefix}loss"] = float((prediction.metrics or {})["x_loss"])
        return result

    def _report_start(self, before: dict[str, float]) -> None:
        selection, total = self.selection, sum(p.numel() for p in self.model.parameters())
        extra = f", and {selection.dense_numel:,} outside the budget (dense)" if selection.dense_numel else ""
        self.console.print(
            f"{selection.method.name}: {selection.budget:,} of {total:,} weights ({selection.budget / total:.3%}){extra}; "
            f"{self.steps:,} steps of {self.config.batch_size * self.config.accumulation}"
        )
        self.console.print("before: " + _line(before))

    def _how_to_go_on(self) -> str:
        checkpoints = self.output / CHECKPOINTS
        last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        if last is None:
            return "interrupted before the first checkpoint; nothing was saved. Start again with the same command."
        return f"interrupted; {last} is kept. Go on with: unmask train --config {self.output / 'config.yaml'} --resume"

    def _finish(self, before: dict[str, float], after: dict[str, float], seconds: float) -> Outcome:
        task = describe_task(self.data.spec, self.max_length)
        into = into_from(self.config)
        inside = {} if into is None else {"into": into.describe()}
        delta = self.selection.delta(self.config.model).with_metadata(task=task, after=after, **inside)
        path = delta.save(self.output / "delta.safetensors")
        summary = self._summary(before, after, seconds, delta, path)
        (self.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        self.console.print("after:  " + _line(after))
        self.console.print(f"delta:  {path} ({path.stat().st_size:,} bytes)")
        self.selection.release()
        return Outcome(before, after, path, summary)

    def _summary(
        self, before: dict[str, float], after: dict[str, float], seconds: float, delta: SparseDelta, path: Path
    ) -> dict[str, Any]:
        return {
            "method": self.selection.method.describe(),
            "budget": self.selection.budget,
            "used": self.selection.used,
            "dense": self.selection.dense_numel,
            "parameters": sum(p.numel() for p in self.model.parameters()),
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


def _line(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


__all__ = ["InterruptedRunError", "Outcome", "planned_steps", "train"]
