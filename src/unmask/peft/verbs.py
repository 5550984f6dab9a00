"""What PEFT has no verb for: an adapter as a delta, its state in words, and a push that keeps the model card."""

from __future__ import annotations

import tempfile
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel

from unmask.delta import SparseDelta
from unmask.peft.model import tuner_of
from unmask.peft.targets import saved_whole


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
    tuner, name = tuner_of(model), _name(model, adapter_name)
    adapter = tuner.deltas.adapters[name]
    dense = sum(tensor.numel() for tensor in saved_whole(tuner.model, name).values())
    steps = "" if adapter.config.total_steps is None else f" of {adapter.config.total_steps:,}"
    return (
        f"{name} ({adapter.config.method}): {adapter.used:,} weights selected of a budget of {adapter.budget:,}, step "
        f"{adapter.step:,}{steps}; {dense:,} numbers trained whole in modules_to_save"
    )


def push_to_hub(model: PeftModel, repo_id: str, **options: Any) -> str:
    """Uploads adapters with the model card that `save_pretrained` writes.

    ``model.push_to_hub(repo_id)`` uploads the same files, but transformers puts a card of its own in the place of PEFT's.

    Args:
        model: A PEFT model.
        repo_id: ``"user/name"``; created if there is none.
        **options: ``private`` and ``token``; what else `huggingface_hub.HfApi.upload_folder` takes.

    Returns:
        The commit's address.
    """
    api, private = HfApi(token=options.pop("token", None)), options.pop("private", None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo, folder_path=folder, **options))


def _name(model: PeftModel, adapter_name: str | None) -> str:
    return str(model.active_adapter) if adapter_name is None else adapter_name
