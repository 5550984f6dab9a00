"""The optimizer of a transformers Trainer whose model has a selection."""

from __future__ import annotations

import copy
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer

from unmask.errors import ConfigError, ScheduleNotRunError
from unmask.selection.selection import Selection


def new_optimizer(trainer: Trainer, selection: Selection) -> Optimizer:
    """The optimizer that ``args.optim`` names, on what the selection trains.

    Raises:
        ConfigError: It takes its parameters from the model itself (GaLore, LOMO, Muon ...).
    """
    kind, settings = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args)
    own = {"params", "model", "optimizer_dict"} & settings.keys()
    if own or not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError(
            f"optim = {str(trainer.args.optim)!r} takes its parameters from the model, where they are frozen; take one that "
            "trains what it is given (adamw_torch, adamw_bnb_8bit, sgd ...), or build one from selection.parameters()."
        )
    return kind(_groups(trainer, selection), **settings)


def _groups(trainer: Trainer, selection: Selection) -> list[dict[str, Any]]:
    """``values`` decays; of the dense tensors those do that the Trainer would let decay: no biases, no norms."""
    decaying = set(trainer.get_decay_parameter_names(trainer.model))  # type: ignore[arg-type]
    spared = [tensor.master for tensor in selection.dense if tensor.name not in decaying]
    rest = [p for p in selection.parameters() if not any(p is master for master in spared)]
    groups = [
        {"params": rest, "weight_decay": trainer.args.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def bare(optimizer: Any) -> Any:
    """An optimizer without accelerate's wrapping."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class GivenOptimizer:
    """The optimizer and learning-rate schedule that a Trainer was built with, as they were before its first step.

    Raises:
        ScheduleNotRunError: The optimizer does not hold the selected weights.
    """

    def __init__(self, trainer: Trainer, selection: Selection) -> None:
        optimizer, schedule = bare(trainer.optimizer), trainer.lr_scheduler
        if not any(p is selection.clock() for group in optimizer.param_groups for p in group["params"]):
            raise ScheduleNotRunError(
                "the Trainer's optimizer does not hold the selected weights (it was built before unmask.select, or from "
                "model.parameters()). Select first and build it from selection.parameters(), or give none: "
                "SelectiveCallback builds the one that args.optim names."
            )
        self._optimizer = copy.deepcopy(optimizer.state_dict())
        self._schedule = None if schedule is None else copy.deepcopy(schedule.state_dict())

    def restore(self, trainer: Trainer) -> None:
        """Back to where they were, for another attempt."""
        bare(trainer.optimizer).load_state_dict(copy.deepcopy(self._optimizer))
        if self._schedule is not None and trainer.lr_scheduler is not None:
            trainer.lr_scheduler.load_state_dict(copy.deepcopy(self._schedule))
