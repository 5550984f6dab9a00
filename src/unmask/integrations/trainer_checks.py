"""What a Trainer with a selection refuses before it starts, instead of training something else."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from unmask.errors import ConfigError, ScheduleNotRunError, SelectionError
from unmask.integrations.trainer_optimizer import bare
from unmask.selection.selection import Selection


def check_run(trainer: Trainer, selection: Selection, steps: int) -> None:
    """Refuses a run of ``steps`` optimizer steps that cannot train the selection as planned."""
    _check_model(selection, trainer.model)
    _check_length(selection, steps)
    if selection.clip_scope == "all" and trainer.args.world_size > 1:
        raise ConfigError(
            "clip_scope='all' knows the norm of one process's gradient only; use clip_scope='selected' with several."
        )


def _check_model(selection: Selection, model: nn.Module | None) -> None:
    whole = {id(tensor.parameter) for tensor in selection.dense}
    if model is None or not any(selection.owns(p) or id(p) in whole for p in model.parameters()):
        raise SelectionError(
            "the Trainer's model is not the one that was selected from (it may be a copy, or made by model_init). Select from "
            "trainer.model, or give SelectiveCallback a method: it selects when train() starts."
        )


def _check_length(selection: Selection, steps: int) -> None:
    """Fewer steps than the schedule's would leave budget unused; more are fine."""
    if selection.method.whole:
        return
    end, budget = selection.step + steps, selection.budget
    reached = selection.method.cumulative(end - 1, budget)
    if reached < budget:
        raise ScheduleNotRunError(
            f"the schedule is spread over {selection.method.schedule.steps:,} steps, and this Trainer ends after {end:,}: "
            f"only {reached:,} of {budget:,} weights would be unmasked. Build the method with steps={end}, or give "
            "SelectiveCallback a function of the number of steps: lambda steps: unmask.id3(budget, steps)."
        )


def check_schedule(optimizer: Any, scheduler: Any) -> None:
    """Refuses a learning-rate schedule of another optimizer."""
    driven = bare(getattr(scheduler, "optimizer", None))
    if driven is not None and driven is not bare(optimizer):
        raise ScheduleNotRunError(
            "the learning-rate schedule drives another optimizer than the one that trains; build it from the optimizer given "
            "in Trainer(..., optimizers=(optimizer, schedule)), or give None for it."
        )
