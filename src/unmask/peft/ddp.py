"""Adapters under DistributedDataParallel: a selection reduces its own gradient, so DDP must leave ``values`` alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from unmask.peft.callers import calling_trainer

if TYPE_CHECKING:
    from unmask.peft.layer import SelectiveLayer


def name_in_peft_model(adapter: str) -> str:
    """The name that an adapter's ``values`` have among a `PeftModel`'s parameters."""
    return f"base_model.deltas.unmask_values.{adapter}"


def stay_unwrapped(layer: SelectiveLayer) -> None:
    """Keeps a Trainer under torchrun from wrapping a model in which DDP would find nothing to reduce.

    DDP refuses such a model. A Trainer moves its model to a device when it is built, which is when this is called.
    """
    trainer = calling_trainer()
    if trainer is None or any(p.requires_grad for p in layer.model.parameters()):
        return
    if not trainer.accelerator.distributed_type.value.startswith("MULTI_"):  # DDP's kinds, of one process too
        return
    prepare = trainer.accelerator.prepare_model
    if not isinstance(prepare, functools.partial):
        trainer.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)
