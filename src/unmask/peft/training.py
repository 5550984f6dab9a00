"""Trains the active adapter: starts its selection at a forward, and follows the attempts of a transformers Trainer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from unmask.errors import MethodError
from unmask.integrations.support import Attempt, check_clip_scope, clip_in, planned_steps, running_trainer
from unmask.peft.adapter import Adapter
from unmask.peft.layer import SelectiveLayer
from unmask.peft.targets import saved_whole
from unmask.selection.selection import Selection


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the start of a selection cannot be compiled
def before_forward(layer: SelectiveLayer) -> None:
    """Runs before each forward of the base: brings ``values`` into the tensors, and starts a selection if needed."""
    adapter = layer.active
    if adapter is None or layer.disable_adapters:
        return
    adapter.catch_up()
    if not torch.is_grad_enabled():
        return
    if not adapter.values.requires_grad:
        adapter.stop()  # the user froze it by hand
        return
    _follow(layer, adapter)
    if adapter.selection is not None:
        adapter.selection.check_model()
        return
    config = adapter.config
    if config.needs_total_steps:
        config.total_steps, adapter.asked = planned_steps(running_trainer()), True
    if not config.needs_total_steps:
        layer.settle()
        adapter.start(layer.model)
    elif layer.model.training:
        name = layer.name_of(adapter)
        raise MethodError(
            f"adapter {name!r} spreads its budget over total_steps, which is not set, and no transformers Trainer runs this "
            "step. Give SelectiveConfig(total_steps=...) the planned number of optimizer steps, or set "
            f"model.peft_config[{name!r}].total_steps before the first step."
        )


def _follow(layer: SelectiveLayer, adapter: Adapter) -> None:
    """Finds the Trainer's attempt that this forward belongs to, and undoes an attempt that has failed."""
    attempt = adapter.attempt
    if attempt is None and adapter.selection is not None:
        return  # the user's own loop: no Trainer needs to be looked for at each forward
    if attempt is not None and attempt.running:
        return
    trainer = running_trainer()
    if attempt is not None and attempt.failed:
        adapter.withdraw(layer.base_of_whole, layer.tensors())
        slots, adapter.whole = attempt.undo()
        adapter.load(slots)
        adapter.write(layer.tensors())
        if adapter.asked:
            adapter.config.total_steps = None
    adapter.attempt = None
    if trainer is None or planned_steps(trainer) is None:
        return
    copies = saved_whole(layer.model, layer.name_of(adapter))
    adapter.attempt = Attempt(trainer, copies.values(), (adapter.slots(), layer.whole_of(adapter)))
    if adapter.config.clip_scope == "all":
        check_clip_scope(trainer, "all")
        clip_in(trainer, functools.partial(trained, layer))


def trained(layer: SelectiveLayer, parameters: Sequence[nn.Parameter]) -> tuple[Selection | None, list[nn.Parameter]]:
    """Returns the active adapter's live selection, if any, and those of the parameters that are trained in addition."""
    adapter = layer.active
    if adapter is None or adapter.selection is None:
        return None, []
    return adapter.selection, [p for p in parameters if p.requires_grad and p is not adapter.values]
