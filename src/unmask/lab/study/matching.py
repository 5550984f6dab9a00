"""Finds the rank of a LoRA or of SHiRA that trains as many weights as a budget has."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch

from unmask.errors import ConfigError
from unmask.lab.models import Head, empty_model, quiet
from unmask.lab.tasks.registry import kind_for
from unmask.lab.training.settings import build
from unmask.methods.budget import Budget


def matching_rank(settings: Mapping[str, Any]) -> int:
    """Returns the rank, at least 1, whose number of trained weights is nearest to the budget.

    It reads the model's configuration alone, and no weights. It ignores the settings' ``lora_r``.

    Raises:
        ConfigError: ``into`` has no rank, or nothing can be added to this model.
    """
    budget = str(settings["budget"])
    given = None if settings.get("method") == "full" else budget  # A LoRA that is trained whole has no budget.
    config = build({**settings, "budget": given, "lora_r": 1, "lora_alpha": 1, "output": "-"})
    if config.into not in ("lora", "dora", "shira"):
        raise ConfigError(f"lora_r = 'match' goes with into = lora, dora or shira, not {config.into!r}.")
    # SHiRA has as many weights as a LoRA of the same rank, and peft cannot build SHiRA on the meta device.
    kind = "lora" if config.into == "shira" else config.into
    total, one, two = _counts(config.model, kind_for(config.task).head, kind, config.lora_targets)
    return max(1, round((Budget.parse(budget).of(total) - one) / (two - one)) + 1)


@functools.lru_cache(maxsize=64)
def _counts(model: str, head: Head, into: str, targets: tuple[str, ...]) -> tuple[int, int, int]:
    """Returns the numbers of weights of the base, and of what ranks 1 and 2 add to it; DoRA adds a fixed number too."""
    from unmask.lab.inside import Into, Kind, insert

    counts = []
    for r in (1, 2):
        base = empty_model(model, head)
        total = sum(p.numel() for p in base.parameters())
        with quiet(), torch.device("meta"):
            inserted = insert(base, Into(cast(Kind, into), r=r, targets=targets), (), seed=0)
        sizes = dict(inserted.model.named_parameters())
        counts.append(sum(sizes[name].numel() for name in inserted.added))
    return total, counts[0], counts[1]
