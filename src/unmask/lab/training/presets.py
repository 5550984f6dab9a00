"""A method, its optimizer, and what it selects inside of, from a run's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, cast

from unmask.lab.inside import Into, Kind
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.recipe import head_rate, rate
from unmask.methods import presets as methods
from unmask.methods.heuristics import heuristic
from unmask.methods.method import Method
from unmask.methods.scopes import Scope
from unmask.selection.optim import BiasCorrection, SelectiveAdamW
from unmask.selection.selection import Selection


def method_from(config: TrainConfig, steps: int, loader: Iterable[Any] | None = None) -> Method:
    """The configured method, planned over ``steps`` optimizer steps.

    Args:
        config: The run's configuration.
        steps: T.
        loader: Batches for a calibration; only ``fish`` and ``sparse_adapter`` need it.

    Example:
        >>> config = TrainConfig(model="m", output="o", task="sst2", method="pafi", budget="100", allocation="row")
        >>> method_from(config, steps=10).allocation
        'row'

    Raises:
        MethodError: There is no such method, or its settings cannot work.
    """
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    settings |= {"steps": steps, "loader": () if loader is None else loader}
    return methods.build(config.method, settings).but(**_changes(config))


def _changes(config: TrainConfig) -> dict[str, Any]:
    """Parts that go with several methods; what they are is checked by `TrainConfig`, whether they go together by `Method`."""
    changes: dict[str, Any] = {}
    if config.allocation is not None:
        changes["allocation"] = config.allocation
    if config.scope is not None:
        changes["scope"] = Scope(config.scope)  # type: ignore[arg-type]
    if config.heuristic not in (None, "d3"):
        own = {"seed": config.seed} if config.heuristic == "random" else {}
        changes["heuristic"] = heuristic(config.heuristic, **own)
    return changes


def with_rates(config: TrainConfig, selection: Selection, total: int, head: Collection[str] = ()) -> TrainConfig:
    """The configuration with the recipe's numbers where a rate is ``auto``.

    Args:
        config: The run's configuration.
        selection: A live selection.
        total: How many weights the model has.
        head: As of `optimizer_from`.
    """
    lr = rate(selection.budget / total, config.into is not None) if config.lr == "auto" else config.lr
    dense_lr = config.dense_lr
    if dense_lr == "auto":
        dense_lr = head_rate(lr, sum(p.dim() > 1 for p in _beside(selection, head)))
    return dataclasses.replace(config, lr=lr, dense_lr=dense_lr)


def _beside(selection: Selection, head: Collection[str]) -> list[Any]:
    """What ``dense_lr`` is for."""
    return [d.master for d in selection.dense if d.name in head or not selection.method.whole]


def optimizer_from(config: TrainConfig, selection: Selection, head: Collection[str] = ()) -> SelectiveAdamW:
    """The configured optimizer of what a selection trains.

    Args:
        config: The run's configuration, its rates numbers (`with_rates`).
        selection: A live selection.
        head: Names of the new head's tensors: where all is trained whole, ``dense_lr`` is for these alone.
    """
    params: list[Any] = selection.parameters()
    if config.dense_lr is not None:
        apart = _beside(selection, head)
        own = [p for p in params if all(p is not q for q in apart)]
        params = [{"params": own}, {"params": apart, "lr": config.dense_lr}] if apart else own
    return SelectiveAdamW(
        params,
        lr=cast(float, config.lr),
        weight_decay=config.weight_decay,
        bias_correction=cast(BiasCorrection, config.bias_correction),  # checked by TrainConfig
    )


def into_from(config: TrainConfig) -> Into | None:
    """What the configured run adds to its base; None for nothing.

    Example:
        >>> into_from(TrainConfig(model="m", output="o", task="sst2", budget="1%", into="lora", lora_r=4)).describe()["r"]
        4
    """
    if config.into is None:
        return None
    return Into(
        cast(Kind, config.into),  # checked by TrainConfig
        config.lora_r,
        config.lora_alpha,
        config.lora_dropout,
        config.lora_targets,
        config.reduction_factor,
        config.seed if config.into == "shira" else 0,
    )
