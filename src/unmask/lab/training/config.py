"""The configuration of a training run: one frozen value, checked. No torch here."""

from __future__ import annotations

import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from unmask.errors import ConfigError
from unmask.lab.tasks.names import TASKS
from unmask.reading import shown


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; written to ``config.yaml`` beside its results.

    Attributes:
        model: Folder or hub id of a transformers base.
        output: Folder for the delta, the resolved configuration, metrics and checkpoints.
        task: A task's name; None for texts to classify in ``data``, ner for tagged sentences there.
        data_dir: Folder that holds the task's files; None for the hub.
        data: Training file (csv, tsv, jsonl, parquet; of ner: conll, txt, bio, ..., jsonl) or hub id.
        eval: Evaluation file; None holds out a tenth of ``data``.
        text: Text column of ``data`` (of ner: the column of word lists, for tokens or words).
        text_pair: Second text column, if the task has pairs.
        label: Label column of ``data`` (of ner: the column of tag lists, for ner_tags or tags).
        into: Select inside what is added to the base: lora, dora, shira (peft), pfeiffer, houlsby (adapters); None: the base
            itself. With method "full" all of it is trained: an ordinary LoRA.
        lora_r: Rank of the LoRA; SHiRA trains as many weights of each layer as a LoRA of this rank would.
        lora_alpha: Its scale is lora_alpha / lora_r.
        lora_dropout: On the LoRA's input.
        lora_targets: Modules that get a LoRA; all-linear for all linear ones, layer-linear for those inside the transformer
            layers (no head, pooler or embedding), none for peft's own choice.
        reduction_factor: A bottleneck adapter's width is the hidden size divided by this.
        method: A preset: id3, repeat_d3, static_d3, pafi, fish, bitfit, random_mask, sparse_adapter, full.
        budget: A count ("320K"), a share of the weights ("0.17%", "320K of 184M"), or a share of the eligible ones ("4% of
            eligible"); None only for bitfit and full, and always for full.
        eps: Of D3.
        exp: Of D3.
        stride: Select every stride-th step (id3, repeat_d3).
        leaving: What becomes of a weight that repeat_d3 no longer picks: restored to its base value, or kept (the paper's).
        schedule: uniform, cosine, front-loaded or at-once (id3).
        heuristic: What ranks instead of D3 (id3, repeat_d3, static_d3); None for D3.
        allocation: global, tensor, row or column; None for the method's own.
        scope: all, linear, bias or vector; None for the method's own.
        include: Regular expressions: only these tensors are eligible.
        exclude: Regular expressions: these tensors are not.
        dense: Regular expressions of tensors trained whole outside the budget; "new" stands for what the checkpoint lacks.
        num_samples: Examples for the Fisher information (fish) and for pruning (sparse_adapter).
        criterion: What sparse_adapter keeps: random, magnitude, snip, grasp or synflow.
        pruned: What becomes of the rest (sparse_adapter): zero, or kept at its initial value.
        lr: Peak learning rate; auto: the recommended recipe's, for a budget of that share of the weights.
        dense_lr: Peak learning rate of what is trained whole beside the budget, under full of the new head; None: lr;
            auto: the recommended recipe's, at most 1e-3 for a head with a hidden layer.
        weight_decay: AdamW's, on the selected weights only.
        bias_correction: Adam's, "global" (torch's) or "entry" (an age per weight, from its unmasking on).
        epochs: Passes over the training data; ignored with max_steps.
        max_steps: Optimizer steps.
        batch_size: Examples per forward.
        accumulation: Micro-batches per optimizer step.
        warmup: Share of the steps with rising learning rate.
        max_grad_norm: Clips the norm of the selected weights' gradient; 0 for no clipping.
        max_length: Longest input in tokens; longer texts are cut, longer sentences of ner are split. 512 for word
            problems, where settings are read by `build`.
        bf16: Autocast to bfloat16.
        gradient_checkpointing: Recompute activations in the backward.
        seed: Of the head's init, the data order and random masks.
        order: Keep the order of unmasking in the delta (4 bytes a weight), so that smaller budgets can be read off it.
        eval_steps: Evaluate every so many steps; None at each epoch's end.
        save_steps: Checkpoint every so many steps; None with each evaluation.
        keep_checkpoints: How many checkpoints are kept, the newest first; none keeps all of them.
        logging_steps: Log every so many steps.
        report_to: Loggers of transformers' Trainer (tensorboard, wandb, ...).
        prompt: Of word problems: alpaca, chat (the tokenizer's own template), or a text file with {instruction} in it.
        train_on_prompt: Let the prompt's tokens carry loss too, and not the solution's alone.
        held_out: Word problems held out of the training data for the loss along the run.
        test_sets: Sets of word problems to solve after training.
        test_limit: Only the first so many problems of each.
        test_batch_size: Prompts per batch there.
        max_new_tokens: Most tokens to generate per problem.
    """

    model: str
    output: str
    task: str | None = None
    data_dir: str | None = None
    data: str | None = None
    eval: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    into: str | None = None
    lora_r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    reduction_factor: float = 16.0
    method: str = "id3"
    budget: str | None = None
    eps: float = 1.0
    exp: float = 2.0
    stride: int = 1
    leaving: str = "restored"
    schedule: str = "uniform"
    heuristic: str | None = None
    allocation: str | None = None
    scope: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dense: tuple[str, ...] = ("new",)
    num_samples: int = 1024
    criterion: str = "snip"
    pruned: str = "zero"
    lr: float | Literal["auto"] = 1e-3
    dense_lr: float | Literal["auto"] | None = None
    weight_decay: float = 0.0
    bias_correction: str = "global"
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    warmup: float = 0.06
    max_grad_norm: float = 1.0
    max_length: int = 128
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    order: bool = False
    eval_steps: int | None = None
    save_steps: int | None = None
    keep_checkpoints: int | None = 2
    logging_steps: int = 20
    report_to: tuple[str, ...] = ()
    prompt: str = "alpaca"
    train_on_prompt: bool = False
    held_out: int = 120
    test_sets: tuple[str, ...] = ()
    test_limit: int | None = None
    test_batch_size: int = 16
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        self._check_types()
        self._check_data()
        self._check_words()
        self._check_method()
        self._check_parts()
        self._check_numbers()

    def _check_types(self) -> None:
        """Every setting has its type, every number is finite, and every whole number is one that a run can have."""
        for name, options in _types().items():
            value = getattr(self, name)
            words = [
                word for option in options for word in typing.get_args(option) if typing.get_origin(option) is Literal
            ]
            if (value is None and type(None) in options) or (isinstance(value, str) and value in words):
                continue
            if not any(_is(value, option) for option in options):
                kinds = " or ".join(getattr(option, "__name__", str(option)) for option in options)
                raise ConfigError(f"{name} = {shown(value)}; it must be {kinds}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} = {value}; it must be finite.")
            if isinstance(value, int) and abs(value) >= 2**31 and name != "seed":
                raise ConfigError(f"{name} = {shown(value)}; it must be below {2**31:,}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {shown(self.seed)}; it must be a whole number from 0 to {2**32 - 1:,}.")

    def _check_data(self) -> None:
        """One source of examples."""
        if self.task is not None and self.task not in TASKS:
            raise ConfigError(
                f"unknown task {self.task!r}; there are {', '.join(TASKS)}. For your own files give data."
            )
        if self.task == "ner":
            if (self.data is None) == (self.data_dir is None):
                raise ConfigError("task 'ner' is your own: give data (and eval), or data_dir, and not both.")
        elif (self.task is None) == (self.data is None):
            raise ConfigError("give either task (with data_dir) or data (with text and label), and not both.")

    def _check_words(self) -> None:
        """Settings that are one of a few words."""
        _one_of("method", self.method, METHODS)
        _one_of("leaving", self.leaving, ("restored", "kept"))
        _one_of("schedule", self.schedule, ("uniform", "cosine", "front-loaded", "at-once"))
        _one_of("heuristic", self.heuristic, (None, *HEURISTICS))
        _one_of("allocation", self.allocation, (None, "global", "tensor", "row", "column"))
        _one_of("scope", self.scope, (None, "all", "linear", "bias", "vector"))
        _one_of("bias_correction", self.bias_correction, ("global", "entry"))
        _one_of("into", self.into, (None, "lora", "dora", "shira", "pfeiffer", "houlsby"))
        _one_of("criterion", self.criterion, ("random", "magnitude", "snip", "grasp", "synflow"))
        _one_of("pruned", self.pruned, ("zero", "kept"))

    def _check_method(self) -> None:
        """What a method needs, and what it cannot have."""
        if self.method == "sparse_adapter" and self.into is None:
            raise ConfigError(
                "method 'sparse_adapter' prunes what is added to the base: give into (lora, pfeiffer, ...)."
            )
        if self.order and self.method in ("repeat_d3", "full"):
            raise ConfigError(f"method {self.method!r} has no order of unmasking; leave order=false.")
        if self.method == "full" and self.budget is not None:
            raise ConfigError(
                f"budget = {self.budget!r}: method 'full' trains every weight, so it has no budget; leave budget out (in a "
                "sweep: budget: null in the method's settings)."
            )
        if self.budget is None and self.method not in ("bitfit", "full"):
            raise ConfigError(
                f"method {self.method!r} needs a budget: a count (20000) or a share of the weights (0.17%)."
            )

    def _check_parts(self) -> None:
        """Parts of a method that another method would not use."""
        if self.heuristic is not None and self.method not in RANKED:
            raise ConfigError(f"heuristic goes with method {', '.join(RANKED)}; method {self.method!r} has its own.")
        if self.leaving != "restored" and self.method != "repeat_d3":
            raise ConfigError(
                f"leaving = {self.leaving!r} goes with method repeat_d3; under method {self.method!r} no weight leaves so."
            )

    def _check_numbers(self) -> None:
        """Settings with bounds."""
        for name in _POSITIVE:
            _above(name, getattr(self, name), 0)
        for name in _POSITIVE_IF_GIVEN:
            if getattr(self, name) is not None:
                _above(name, getattr(self, name), 0)
        if self.lr != "auto":
            _above("lr", self.lr, 0)
        if self.dense_lr is not None and self.dense_lr != "auto":
            _above("dense_lr", self.dense_lr, 0)
        for name in ("weight_decay", "warmup", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}; it must be 0 or more.")
        if self.warmup >= 1:
            raise ConfigError(f"warmup = {self.warmup}; it is a share of the steps, below 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout = {self.lora_dropout}; it is a probability, from 0 to below 1.")


# the keys of unmask.methods.presets.PRESETS, which would import torch; a test holds them together
RANKED = ("id3", "repeat_d3", "static_d3")
METHODS = (*RANKED, "pafi", "fish", "bitfit", "random_mask", "sparse_adapter", "full")
# the registered heuristics but those that are estimated before training, by methods of their own
HEURISTICS = ("constant", "d3", "gradient", "large_magnitude", "magnitude", "random", "snip")

_POSITIVE = (
    "epochs",
    "batch_size",
    "accumulation",
    "max_length",
    "held_out",
    "test_batch_size",
    "max_new_tokens",
    "logging_steps",
    "stride",
    "num_samples",
    "lora_r",
    "lora_alpha",
    "reduction_factor",
)
_POSITIVE_IF_GIVEN = ("max_steps", "eval_steps", "save_steps", "keep_checkpoints", "test_limit")


@functools.cache
def _types() -> dict[str, tuple[Any, ...]]:
    """The types that each setting may have."""
    hints = typing.get_type_hints(TrainConfig)
    unions = (types.UnionType, typing.Union)
    return {
        name: typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,) for name, hint in hints.items()
    }


def _is(value: Any, option: Any) -> bool:
    """Whether a value has a type; a whole number is a float too, and a bool is no number."""
    if typing.get_origin(option) is tuple:
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    if option is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(option, type) and isinstance(value, option)


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name} = {value!r}; it must be one of {', '.join(str(a) for a in allowed if a is not None)}."
        )


def _above(name: str, value: float, bound: float) -> None:
    if not value > bound:
        raise ConfigError(f"{name} = {value}; it must be above {bound}.")
