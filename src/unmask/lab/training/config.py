"""The configuration of a training run: one frozen value, checked when it is built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from unmask.errors import ConfigError, DataError, MethodError
from unmask.lab.training.fields import required, setting, settings_of
from unmask.methods.method import Allocation, BiasCorrection, Criterion, Inside, Leaving, Method, Unselected
from unmask.methods.scopes import NamedKind
from unmask.reading import choices, shown

FREE = (
    *("output", "eval_steps", "save_steps", "keep_checkpoints", "logging_steps", "report_to"),
    *("test_sets", "test_limit", "test_batch_size", "max_new_tokens"),
)
"""The settings that the delta does not depend on, so that a resumed run may change them."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on. The run writes it to ``config.yaml`` in its output folder.

    Each field below has its help text, which ``unmask train --help`` and docs/cli.md show too. ``method=None`` stands for the
    recommended recipe: the new value has the recipe's method and scope (`unmask.lab.training.recipe`), so that ``method`` is
    always a name afterwards.

    Raises:
        ConfigError: A setting is not allowed, or two settings do not go together.

    Example:
        >>> config = TrainConfig(model="m", output="o", task="sst2", budget="0.17%")
        >>> config.method, config.scope, config.lr
        ('random_mask', 'linear', 'auto')
    """

    model: str = required("The base model: a folder or a hub id.")
    output: str = required("The folder for the delta, the resolved configuration, the metrics and the checkpoints.")
    task: str | None = setting(
        None,
        "The task: sst2, cola, mrpc, rte, stsb, qnli, qqp or mnli (GLUE); conll2003 or wnut17, or ner for tagged "
        "sentences of your own; gsm8k, math10k and other word problems. Without a task, data holds texts of your own "
        "to classify.",
    )
    data_dir: str | None = setting(None, "The folder with the task's files; without it they come from the hub.")
    data: str | None = setting(
        None, "Your training data: a csv, tsv, jsonl, json or parquet file, of ner also conll, txt or bio, or a hub id."
    )
    eval: str | None = setting(None, "Your evaluation data, a file; without it a tenth of data is held out.")
    text: str = setting("text", "The text column of data; of ner, the column of word lists, called tokens or words.")
    text_pair: str | None = setting(None, "The second text column, if the task has pairs.")
    label: str = setting("label", "The label column of data; of ner, the column of tag lists, called ner_tags or tags.")
    num_labels: int | None = setting(
        None, "The number of classes of data; 1 for a regression on whole numbers. Without it the labels tell."
    )
    delimiter: str | None = setting(
        None,
        "The character between two cells of data's csv and tsv files, such as ; or tab; without it, the file tells.",
    )
    encoding: str = setting("utf-8", "The encoding of data's text files, such as latin-1 or cp1252.")
    drop_missing: bool = setting(
        False, "Leave out rows of data that lack a text or a label; without it such a row is an error."
    )
    into: Inside | None = setting(
        None,
        "Select inside modules that are added to the base: by peft (lora, dora, shira) or by adapters (pfeiffer, "
        "houlsby). Without it the run selects in the base itself. With method full all added weights are trained: an "
        "ordinary LoRA.",
    )
    lora_r: int = setting(8, "The LoRA's rank. SHiRA trains as many weights of a layer as a LoRA of this rank would.")
    lora_alpha: float = setting(8.0, "The LoRA's scale is lora_alpha / lora_r.")
    lora_dropout: float = setting(0.0, "The dropout on the LoRA's input.")
    lora_targets: tuple[str, ...] = setting(
        (),
        "The modules that get a LoRA: all-linear for all linear ones, layer-linear for those inside the transformer "
        "layers (no head, pooler or embedding); none for peft's own choice.",
    )
    reduction_factor: float = setting(16.0, "A bottleneck adapter's width is the hidden size divided by this number.")
    method: str | None = setting(
        None, "The method, one of those that `unmask methods` lists; without it the run takes the recommended recipe."
    )
    budget: str | None = setting(
        None,
        "The number of scalar weights to unmask: a count (20000, 320K), a share of the weights (0.17%, 320K of 184M) "
        "or of the eligible ones (4% of eligible). Method bitfit can do without; method full has none.",
    )
    eps: float = setting(1.0, "The number that D3 adds to |w|.")
    exp: float = setting(2.0, "The exponent of D3.")
    stride: int = setting(1, "Select at every stride-th step (id3, repeat_d3).")
    leaving: Leaving = setting(
        "restored", "A weight that repeat_d3 no longer picks is restored to its base value, or kept, as in the paper."
    )
    schedule: str = setting("uniform", "How id3 spreads the budget over steps: uniform, cosine, front-loaded, at-once.")
    heuristic: str | None = setting(
        None,
        "The heuristic that ranks weights in place of D3 (id3, repeat_d3, static_d3), such as snip, or a plugin's.",
    )
    allocation: Allocation | None = setting(
        None, "How the budget spreads over the weights: in one ranking, or in fair shares by tensor, row or column."
    )
    scope: NamedKind | None = setting(None, "Which tensors are eligible; without it, those of the method's own scope.")
    include: tuple[str, ...] = setting((), "Regular expressions: only tensors in whose name one is found are eligible.")
    exclude: tuple[str, ...] = setting((), "Regular expressions: tensors in whose name one is found are not eligible.")
    avoid: tuple[str, ...] = setting(
        (), "Delta files of other tasks on this base: the budget is drawn from the weights that none of them sets."
    )
    dense: tuple[str, ...] = setting(
        ("new",), "Regular expressions of tensors to train whole, outside the budget; new: those that the base lacks."
    )
    num_samples: int = setting(1024, "The number of examples for fish's Fisher information and for sparse_adapter.")
    criterion: Criterion = setting("snip", "By which score sparse_adapter keeps weights.")
    pruned: Unselected = setting(
        "zero", "What sparse_adapter does with the other weights: it zeroes them, or keeps their initial values."
    )
    plugin: tuple[str, ...] = setting(
        (), "Python files to run first (unmask.register_heuristic works there). Give only files that you trust."
    )
    lr: float | Literal["auto"] = setting(
        "auto", "The peak learning rate; auto takes the recipe's rate for a random mask, and 1e-3 for any other method."
    )
    dense_lr: float | Literal["auto"] | None = setting(
        None,
        "The peak learning rate of what is trained whole outside the budget; under method full, of the new head. "
        "none takes lr; auto takes lr, but at most 1e-3 for a head with a hidden layer. The recommended recipe takes "
        "auto.",
    )
    weight_decay: float = setting(0.0, "AdamW's weight decay, on the selected weights only.")
    bias_correction: BiasCorrection = setting(
        "global", "Adam's bias correction counts steps from the run's start, or for each entry from its unmasking."
    )
    epochs: float = setting(3.0, "The number of passes over the training data; max_steps takes its place.")
    max_steps: int | None = setting(None, "The number of optimizer steps, in place of epochs.")
    batch_size: int = setting(16, "The number of examples per forward pass.")
    accumulation: int = setting(1, "The number of micro-batches per optimizer step.")
    warmup: float = setting(0.06, "The share of the steps in which the learning rate rises. Then it falls linearly.")
    max_grad_norm: float = setting(1.0, "The norm at which the gradient of selected weights is clipped; 0 for none.")
    max_length: int = setting(
        128,
        "The longest input in tokens (512 by default on word problems). Longer texts are cut, those of ner are split.",
    )
    bf16: bool = setting(False, "Run the forward pass under autocast to bfloat16.")
    gradient_checkpointing: bool = setting(False, "Compute activations again in the backward pass, to save memory.")
    seed: int = setting(0, "The seed of the new head, of the data order and of random masks.")
    order: bool = setting(
        False, "Keep the order of unmasking in the delta (4 bytes a weight), to read smaller budgets off it."
    )
    ladder: int | None = setting(
        None, "Keep the deltas of so many growing budgets of the run, in one file, ladder.safetensors."
    )
    eval_steps: int | None = setting(None, "Evaluate every so many steps; without it, at the end of each epoch.")
    save_steps: int | None = setting(None, "Save a checkpoint every so many steps; without it, with each evaluation.")
    keep_checkpoints: int | None = setting(2, "How many checkpoints are kept, the newest first; none keeps all.")
    logging_steps: int = setting(20, "Log every so many steps.")
    report_to: tuple[str, ...] = setting((), "The loggers of transformers' Trainer, such as tensorboard or wandb.")
    prompt: str = setting(
        "alpaca",
        "The prompt of word problems: alpaca, chat (the tokenizer's own), or a text file with {instruction} in it.",
    )
    train_on_prompt: bool = setting(False, "Let the prompt's tokens carry loss too, and not the solution's alone.")
    held_out: int = setting(120, "The number of word problems that are held out for the loss along the run.")
    test_sets: tuple[str, ...] = setting((), "The sets of word problems to solve after training.")
    test_limit: int | None = setting(None, "Solve only the first so many problems of each set.")
    test_batch_size: int = setting(16, "The number of prompts per batch there.")
    max_new_tokens: int = setting(256, "The largest number of tokens to generate per problem.")

    def __post_init__(self) -> None:
        for name, each in settings_of(TrainConfig).items():
            each.check(getattr(self, name))
        # `unmask --help` reads this class, and does not wait for what is imported here and below.
        from unmask.lab.tasks.names import TASKS
        from unmask.lab.training.recipe import recommended

        if self.task is not None and self.task not in TASKS:
            raise ConfigError(
                f"unknown task {self.task!r}; there are {choices(self.task, TASKS)}. For your own files give data."
            )
        if self.task == "ner":
            if (self.data is None) == (self.data_dir is None):
                raise ConfigError("task 'ner' is your own: give data (and eval), or data_dir, and not both.")
        elif (self.task is None) == (self.data is None):
            raise ConfigError("give either task (with data_dir) or data (with text and label), and not both.")
        self._check_data()
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {shown(self.seed)}; it must be a whole number from 0 to {2**32 - 1:,}.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value not in (None, "auto") and not value > 0:
                raise ConfigError(f"{name} = {value}; it must be above 0.")
        for name in ("weight_decay", "warmup", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} = {getattr(self, name)}; it must be 0 or more.")
        if self.warmup >= 1:
            raise ConfigError(f"warmup = {self.warmup}; it is a share of the steps, below 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout = {self.lora_dropout}; it is a probability, from 0 to below 1.")
        if self.method is None:
            for name, value in recommended(self.task, self.into).items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        self._check_method()

    def _check_data(self) -> None:
        """Refuses settings of the user's own files that cannot be, or that would not be used."""
        from unmask.lab.tasks.tables import TextFormat

        defaults = settings_of(TrainConfig)
        names = ("num_labels", "delimiter", "encoding", "drop_missing")
        given = [name for name in names if getattr(self, name) != defaults[name].default]
        if given and (self.task is not None or self.data is None):
            raise ConfigError(f"{', '.join(given)}: for texts of your own only, which data names (without a task).")
        try:
            TextFormat(self.delimiter, self.encoding)
        except DataError as error:
            raise ConfigError(str(error)) from error

    def _check_method(self) -> None:
        """Refuses what a method needs and lacks, and what it cannot have."""
        from unmask.methods.presets import PRESETS

        if self.method not in PRESETS:
            raise ConfigError(f"method = {shown(self.method)}; it must be one of {choices(self.method, PRESETS)}.")
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
            raise ConfigError(f"method {self.method!r} needs a budget: a count (20000) or a share of weights (0.17%).")
        if self.leaving != "restored" and self.method != "repeat_d3":
            raise ConfigError(
                f"leaving = {self.leaving!r} goes with method repeat_d3; under method {self.method!r} no weight leaves so."
            )
        try:
            self.build_method(steps=1)
        except MethodError as error:
            raise ConfigError(str(error)) from error

    def build_method(self, steps: int, loader: Any = ()) -> Method:
        """Builds the method, planned over some optimizer steps.

        ``steps`` is T, and ``loader`` has the batches for the calibration of fish and sparse_adapter.

        Raises:
            MethodError: The method cannot work with these settings.

        Example:
            >>> config = TrainConfig(model="m", output="o", task="sst2", method="pafi", budget="100", allocation="row")
            >>> config.build_method(steps=10).allocation
            'row'
        """
        from unmask.methods.presets import build

        assert self.method is not None, "set when this value was built"
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return build(self.method, {**settings, "steps": steps, "loader": loader})


# The settings that must be above 0, where they are given.
_POSITIVE = (
    *("epochs", "batch_size", "accumulation", "max_length", "held_out", "test_batch_size", "max_new_tokens", "stride"),
    *("logging_steps", "num_samples", "lora_r", "lora_alpha", "reduction_factor", "lr", "dense_lr"),
    *("num_labels", "max_steps", "eval_steps", "save_steps", "keep_checkpoints", "test_limit", "ladder"),
)
