"""Sets up a run of ``unmask train``: its data, base model, selection and optimizer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import set_seed

from unmask.delta.base import missing_from_checkpoint
from unmask.delta.delta import SparseDelta
from unmask.distributed.processes import launched
from unmask.lab.inside import Inserted, Into, insert, require
from unmask.lab.models import Head, empty_model, load_base
from unmask.lab.tasks.protocol import Prepared, Source
from unmask.lab.tasks.registry import kind_for
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.recipe import RECIPE, head_rate, rate
from unmask.methods.budget import Budget
from unmask.methods.scopes import exactly
from unmask.selection.eligible import facts_of
from unmask.selection.optim import SelectiveAdamW
from unmask.selection.select import select
from unmask.selection.selection import Selection


def planned_steps(config: TrainConfig, examples: int, processes: int = 1) -> int:
    """Returns T, the number of optimizer steps: ``max_steps``, or the number that the epochs make.

    The last step of an epoch may have fewer examples. Each process takes ``batch_size`` other examples per forward.

    Example:
        >>> planned_steps(TrainConfig(model="m", output="o", task="rte", budget="1%", epochs=2, batch_size=8), 100)
        26
    """
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(examples / (config.batch_size * processes))
    return math.ceil(config.epochs * math.ceil(batches / config.accumulation))


@dataclass(frozen=True)
class Setup:
    """The parts of a run before its first step.

    They are the configuration as the user gave it, the task's name, the task as it is prepared for the model, the model with
    the LoRA or adapters that the run adds, T (the number of optimizer steps), and the live selection.
    """

    config: TrainConfig
    task: str
    prepared: Prepared
    base: Inserted
    steps: int
    selection: Selection

    def delta(self, **more: Any) -> SparseDelta:
        """Records the weights changed by now, with the metadata that ``unmask eval`` and ``apply`` need, and ``more``."""
        into = into_from(self.config)
        inside = {} if into is None else {"into": into.describe()}
        delta = self.selection.delta(self.config.model, order=self.config.order)
        return delta.with_metadata(task=self.prepared.describe(), **inside, **more)


def set_up(config: TrainConfig, console: Console) -> Setup:
    """Loads the data and the base of a run, and makes its selection. Equal configurations give equal setups."""
    into, kind, source = into_from(config), kind_for(config.task), Source.of(config)
    others = [SparseDelta.load(path) for path in config.avoid]
    if into is not None:
        require(into)
    _check_model(config, kind.head)
    task = kind.load(source)
    print_notes(console, task.notes)
    model, tokenizer, missing = load_base(config.model, task.num_labels, config.seed, kind.head, task.label_names)
    prepared = task.prepare(model, tokenizer, source)
    print_notes(console, prepared.notes)
    # Without `into` the method's scope holds, and all tensors that the checkpoint lacks are the head.
    base = Inserted(model, [], missing, missing) if into is None else insert(model, into, missing, config.seed)
    model = base.model
    steps = planned_steps(config, len(prepared.train_set), launched())  # type: ignore[arg-type]
    if launched() > 1:  # a resumed run keeps its number of steps, with any number of processes
        config = replace(config, max_steps=steps)
    set_seed(config.seed)
    if config.gradient_checkpointing:
        # transformers 5.23 has renamed the method; 4.57 has only the old name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    head = exactly(base.head)
    loader = DataLoader(prepared.train_set, config.batch_size, shuffle=True, collate_fn=prepared.collate)
    selection = select(
        model,
        config.build_method(steps, loader),
        include=config.include or exactly(base.added) or None,
        exclude=config.exclude or None,
        dense=[p for given in config.dense for p in (head if given == "new" else [given])] or None,
        new=exactly(base.new),
        avoid=others,
    )
    return Setup(config, task.name, prepared, base, steps, selection)


def _check_model(config: TrainConfig, head: Head) -> None:
    """Refuses a model, patterns and a budget that cannot work, by the model's configuration and its checkpoint's header alone.

    A share as the budget, deltas to avoid, and what is selected inside added modules are checked when the selection is made.

    Raises:
        ConfigError: There is no such model.
        MethodError: A pattern is found in no name, nothing is eligible, or the budget is larger than what is.
    """
    model = empty_model(config.model, head)
    if config.into is not None or hasattr(model.config, "quantization_config"):
        return
    method, new = config.build_method(1), exactly(missing_from_checkpoint(model))
    if method.budget is not None and method.budget.relative:  # of weights whose number depends on the labels
        method = method.but(budget=Budget.parse(1))
    dense = [p for given in config.dense for p in (new if given == "new" else [given])] or None
    facts_of(model, method, config.include or None, config.exclude or None, dense, None, None, sharded=False)


def into_from(config: TrainConfig) -> Into | None:
    """Returns what the configured run adds to its base; None for nothing.

    Example:
        >>> into_from(TrainConfig(model="m", output="o", task="sst2", budget="1%", into="lora", lora_r=4)).describe()["r"]
        4
    """
    if config.into is None:
        return None
    settings = (config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_targets, config.reduction_factor)
    return Into(config.into, *settings, seed=config.seed if config.into == "shira" else 0)


def with_rates(config: TrainConfig, selection: Selection, total: int, head: Collection[str] = ()) -> TrainConfig:
    """Returns the configuration with numbers in place of rates that are ``auto``; ``total`` counts the model's weights."""
    lr, dense_lr = config.lr, config.dense_lr
    if lr == "auto":
        recipe = selection.method.name == RECIPE["method"]
        lr = rate(selection.budget / total, config.into is not None) if recipe else 1e-3
    if dense_lr == "auto":
        dense_lr = head_rate(lr, sum(p.dim() > 1 for p in _dense_parameters(selection, head)))
    return replace(config, lr=lr, dense_lr=dense_lr)


def optimizer_from(config: TrainConfig, selection: Selection, head: Collection[str] = ()) -> SelectiveAdamW:
    """Builds the configured optimizer of what a selection trains. The rates are numbers (see `with_rates`).

    Where all is trained whole, ``dense_lr`` is for the tensors of the new ``head`` alone.
    """
    params: list[Any] = selection.parameters()
    if config.dense_lr is not None:
        apart = _dense_parameters(selection, head)
        own = [p for p in params if all(p is not q for q in apart)]
        params = [{"params": own}, {"params": apart, "lr": config.dense_lr}] if apart else own
    lr = cast(float, config.lr)
    return SelectiveAdamW(params, lr, weight_decay=config.weight_decay, bias_correction=config.bias_correction)


def _dense_parameters(selection: Selection, head: Collection[str]) -> list[Tensor]:
    """Returns the parameters that ``dense_lr`` is for."""
    return [d.master for d in selection.dense if d.name in head or not selection.method.whole]


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Prints each note on a line that begins with ``note:``."""
    for note in notes:
        console.print(f"note: {note}")


def in_words(metrics: Mapping[str, float]) -> str:
    """Returns metrics as a line of text.

    Example:
        >>> in_words({"loss": 0.25, "accuracy": 0.9})
        'loss 0.2500, accuracy 0.9000'
    """
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
