"""Builds parts of a run from its configuration: the optimizer with its learning rates, and what is added to the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, cast

from torch import Tensor

from unmask.lab.inside import Into
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.recipe import RECIPE, head_rate, rate
from unmask.selection.optim import SelectiveAdamW
from unmask.selection.selection import Selection


def with_rates(config: TrainConfig, selection: Selection, total: int, head: Collection[str] = ()) -> TrainConfig:
    """Returns the configuration with numbers in place of rates that are ``auto``; ``total`` counts the model's weights."""
    lr, dense_lr = config.lr, config.dense_lr
    if lr == "auto":
        recipe = selection.method.name == RECIPE["method"]
        lr = rate(selection.budget / total, config.into is not None) if recipe else 1e-3
    if dense_lr == "auto":
        dense_lr = head_rate(lr, sum(p.dim() > 1 for p in _dense_parameters(selection, head)))
    return dataclasses.replace(config, lr=lr, dense_lr=dense_lr)


def _dense_parameters(selection: Selection, head: Collection[str]) -> list[Tensor]:
    """Returns the parameters that ``dense_lr`` is for."""
    return [d.master for d in selection.dense if d.name in head or not selection.method.whole]


def optimizer_from(config: TrainConfig, selection: Selection, head: Collection[str] = ()) -> SelectiveAdamW:
    """Builds the configured optimizer of what a selection trains. The configuration has numbers as its rates (`with_rates`).

    Where all is trained whole, ``dense_lr`` is for the tensors of the new ``head`` alone.
    """
    params: list[Any] = selection.parameters()
    if config.dense_lr is not None:
        apart = _dense_parameters(selection, head)
        own = [p for p in params if all(p is not q for q in apart)]
        params = [{"params": own}, {"params": apart, "lr": config.dense_lr}] if apart else own
    return SelectiveAdamW(
        params,
        lr=cast(float, config.lr),
        weight_decay=config.weight_decay,
        bias_correction=config.bias_correction,
    )


def into_from(config: TrainConfig) -> Into | None:
    """Returns what the configured run adds to its base; None for nothing.

    Example:
        >>> into_from(TrainConfig(model="m", output="o", task="sst2", budget="1%", into="lora", lora_r=4)).describe()["r"]
        4
    """
    if config.into is None:
        return None
    return Into(
        config.into,
        config.lora_r,
        config.lora_alpha,
        config.lora_dropout,
        config.lora_targets,
        config.reduction_factor,
        config.seed if config.into == "shira" else 0,
    )
