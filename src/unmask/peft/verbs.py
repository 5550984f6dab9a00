"""What PEFT has no verb for: an adapter as a delta, and its state in words."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft import PeftModel
from unmask.delta.delta import SparseDelta
from unmask.peft.clipping import clip
from unmask.peft.model import tuner_of


def delta(model: PeftModel, adapter_name: str | None = None) -> SparseDelta:
    """An adapter of a PEFT model as a delta, which applies to the plain base without PEFT.

    Args:
        model: From `peft.get_peft_model` or `peft.PeftModel.from_pretrained`.
        adapter_name: None for the active one.

    Returns:
        The delta; tensors of ``modules_to_save`` are in it whole, under the base's names.

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
    """What an adapter holds now, in a line: selected weights, budget, steps, and what is trained whole beside it.

    Args:
        model: A PEFT model.
        adapter_name: None for the active one.
    """
    return tuner_of(model).deltas.describe(_name(model, adapter_name))


def clip_grad_norm_(model: PeftModel, max_norm: float, loss_scale: float = 1.0) -> Tensor:
    """Clips what a PEFT model trains, by the norm that ``SelectiveConfig(clip_scope=...)`` names; a Trainer needs no such call.

    Args:
        model: A PEFT model; call this between ``backward`` and ``step``.
        max_norm: The largest norm allowed.
        loss_scale: As for `unmask.clip_grad_norm_`.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        ScheduleNotRunError: Nothing is being trained.
    """
    return clip(tuner_of(model).deltas, model.parameters(), max_norm, loss_scale)


def push_to_hub(model: PeftModel, repo_id: str, **options: Any) -> str:
    """Uploads adapters with their model card: ``model.push_to_hub(repo_id, **options)``, as text.

    Args:
        model: A PEFT model.
        repo_id: ``"user/name"``; created if there is none.
        **options: ``private``, ``token``, ``commit_message`` and the like, as for any model of transformers.

    Returns:
        The commit's address.
    """
    return str(model.push_to_hub(repo_id, **options))


def _name(model: PeftModel, adapter_name: str | None) -> str:
    return str(model.active_adapter) if adapter_name is None else adapter_name
