"""Clipping of what a PEFT model trains: by its norm, or by that of the whole gradient (``clip_scope="all"``)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from unmask.errors import ConfigError, ScheduleNotRunError
from unmask.selection.clipping import clip_grad_norm_ as clip_selection

if TYPE_CHECKING:
    from unmask.peft.layer import SelectiveLayer


def clip(layer: SelectiveLayer, parameters: Iterable[nn.Parameter], max_norm: float, loss_scale: float = 1.0) -> Tensor:
    """Clips the active adapter's gradient and that of the other parameters given; see `unmask.clip_grad_norm_`."""
    adapter = layer.active
    if adapter is None or adapter.selection is None:
        raise ScheduleNotRunError(
            "there is no gradient to clip: no adapter is being trained. The order is loss.backward(), "
            "unmask.peft.clip_grad_norm_(model, ...), optimizer.step()."
        )
    values = adapter.values
    beside = [p for p in parameters if p.requires_grad and p is not values]
    return clip_selection(adapter.selection, max_norm, loss_scale, beside)


class TrainersClipping:
    """In the place of ``accelerator.clip_grad_norm_`` of a Trainer that trains an adapter with ``clip_scope="all"``."""

    def __init__(self, accelerator: Any, layer: SelectiveLayer) -> None:
        self._accelerator, self._theirs = accelerator, accelerator.clip_grad_norm_
        self._layer = weakref.ref(layer)

    def __call__(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2) -> Any:
        layer, accelerator = self._layer(), self._accelerator
        adapter = None if layer is None else layer.active
        if layer is None or adapter is None or adapter.selection is None or adapter.config.clip_scope == "selected":
            return self._theirs(parameters, max_norm, norm_type)
        accelerator.unscale_gradients()
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        return clip(layer, parameters, max_norm, scale)


def clip_in(trainer: Any, layer: SelectiveLayer) -> None:
    """Makes a Trainer clip by the norm of the whole gradient.

    Raises:
        ConfigError: It has several processes.
    """
    if trainer.args.world_size > 1:
        raise ConfigError(
            "clip_scope='all' knows the norm of one process's gradient only; use clip_scope='selected' with several."
        )
    if not isinstance(trainer.accelerator.clip_grad_norm_, TrainersClipping):
        trainer.accelerator.clip_grad_norm_ = TrainersClipping(trainer.accelerator, layer)
