"""Functions on a PEFT model that PEFT itself lacks: an adapter as a delta, its state in words, clipping, uploading."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft import PeftModel
from unmask.delta.delta import SparseDelta
from unmask.errors import ScheduleNotRunError
from unmask.peft.model import tuner_of
from unmask.peft.training import trained
from unmask.selection.clipping import clip_grad_norm_ as clip_selection


def delta(model: PeftModel, adapter_name: str | None = None) -> SparseDelta:
    """Returns an adapter of a PEFT model as a delta, which applies to the plain base without PEFT.

    Args:
        model: A model from `peft.get_peft_model` or `peft.PeftModel.from_pretrained`.
        adapter_name: The adapter's name; None takes the active one.

    Returns:
        The delta. It holds the tensors of ``modules_to_save`` whole, under the base's names.

    Example:
        >>> import peft, torch, unmask.peft
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> config = unmask.peft.SelectiveConfig(budget=3, method="pafi", target_modules=["0"])
        >>> model = peft.get_peft_model(base, config)
        >>> len(unmask.peft.delta(model))
        0
    """
    return tuner_of(model).delta(_name(model, adapter_name))


def status(model: PeftModel, adapter_name: str | None = None) -> str:
    """Describes an adapter (None: the active one) in a line: selected weights, budget, steps, and numbers trained whole."""
    return tuner_of(model).deltas.describe(_name(model, adapter_name))


def clip_grad_norm_(model: PeftModel, max_norm: float, loss_scale: float = 1.0) -> Tensor:
    """Clips the gradient of what a PEFT model trains, by the norm that ``SelectiveConfig(clip_scope=...)`` names.

    Call it between ``backward`` and ``step``. A transformers Trainer clips without this call.

    Args:
        model: A PEFT model.
        max_norm: The largest norm allowed.
        loss_scale: As of `unmask.clip_grad_norm_`.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        ScheduleNotRunError: No adapter is being trained.
    """
    selection, others = trained(tuner_of(model).deltas, list(model.parameters()))
    if selection is None:
        raise ScheduleNotRunError(
            "there is no gradient to clip: no adapter is being trained. The order is loss.backward(), "
            "unmask.peft.clip_grad_norm_(model, ...), optimizer.step()."
        )
    return clip_selection(selection, max_norm, loss_scale, others)


def push_to_hub(model: PeftModel, repo_id: str, **options: Any) -> str:
    """Uploads a PEFT model's adapters with their model card, by ``model.push_to_hub``, and returns the commit's address.

    The repository ``"user/name"`` is created if it does not exist. The options are those of any model of transformers:
    ``private``, ``token``, ``commit_message`` and others.
    """
    return str(model.push_to_hub(repo_id, **options))


def _name(model: PeftModel, adapter_name: str | None) -> str:
    return str(model.active_adapter) if adapter_name is None else adapter_name
