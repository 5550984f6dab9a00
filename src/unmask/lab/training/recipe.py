"""The recommended recipe: what ``unmask train`` does where no method is named. No torch here.

Chosen in experiments/study; docs/results.md has the figures, and where it loses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unmask.errors import ConfigError
from unmask.lab.tasks.names import TASKS
from unmask.lab.training.settings import is_none

# lr: rate(); dense_lr: head_rate()
RECIPE: Mapping[str, Any] = MappingProxyType(
    {"method": "random_mask", "scope": "linear", "lr": "auto", "dense_lr": "auto"}
)
INSIDE_LORA: Mapping[str, Any] = MappingProxyType({"method": "random_mask", "lr": "auto", "dense_lr": "auto"})


def rate(share: float, inside: bool = False) -> float:
    """The recipe's peak learning rate: 1e-2 for 0.2% of the weights, else in inverse proportion to the share's root.

    Adam moves each weight about as far in a step; so what a layer computes moves about as far whatever the budget. At most
    3e-2, the largest rate that was at its best in the study (at 0.05%); inside a LoRA, where 3e-2 diverged, 1e-2.

    Args:
        share: The budget as a share of the model's weights, above 0.
        inside: Whether the budget lies inside added modules.

    Example:
        >>> rate(0.002), round(rate(0.01), 5), rate(1e-5)
        (0.01, 0.00447, 0.03)
    """
    return min(0.01 if inside else 0.03, 0.01 * math.sqrt(0.002 / share))


def head_rate(lr: float, matrices: int) -> float:
    """The recipe's peak learning rate for what is trained whole beside the budget: a new head.

    A head of one layer is at its best at the mask's own rate. In one with a hidden layer all inputs of a unit move together, and
    then all units; it does not stand the rates at which a sparse mask is at its best.

    Args:
        lr: The mask's rate.
        matrices: How many weight matrices are trained whole.

    Example:
        >>> head_rate(1e-2, 1), head_rate(1e-2, 2), head_rate(3e-4, 2)
        (0.01, 0.001, 0.0003)
    """
    return lr if matrices < 2 else min(lr, 1e-3)


def under_preset(name: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a run's settings over those of a preset.

    Args:
        name: ``"recommended"``: the recipe above. ``"paper"``: the paper's settings for the task (its Table 7), with ID3. The
            paper has four runs; a single one has the rate and the seed of the second, 3e-4 and 7 (under method full 7e-6
            and 7; on word problems, where the paper has one run, 3e-4 and 42). ``"tuned"``: this project's settings for the
            task, with ID3, the second rate of the method's grid and seed 1. None: recommended, unless ``settings`` name a
            method, which then comes with its own defaults. ID3 as published is the default inside added modules (``into``)
            other than a LoRA, which were not studied, and on word problems, where it was ahead.
        settings: The run's settings, with ``task`` under paper and tuned.

    Raises:
        ConfigError: There is no such preset, or it has no settings for the task.

    Example:
        >>> under_preset(None, {"task": "cola", "lr": 3e-3})
        {'method': 'random_mask', 'scope': 'linear', 'lr': 0.003, 'dense_lr': 'auto', 'task': 'cola'}
        >>> under_preset(None, {"task": "cola", "method": "pafi"})
        {'task': 'cola', 'method': 'pafi'}
        >>> run = under_preset("paper", {"task": "cola", "epochs": 1})
        >>> run["method"], run["lr"], run["seed"], run["batch_size"], run["epochs"]
        ('id3', '3e-4', 7, 16, 1)
    """
    into = settings.get("into")
    recipe = INSIDE_LORA if into == "lora" else RECIPE
    if name is None:
        studied = (is_none(into) or into == "lora") and TASKS.get(str(settings.get("task"))) != "generation"
        return {**(recipe if studied and is_none(settings.get("method")) else {}), **settings}
    if name == "recommended":
        return {**recipe, **settings}
    if name in ("paper", "tuned"):
        from unmask.lab.training.paper import preset

        method = str(settings.get("method", "id3"))
        run = preset(str(settings.get("task")), name).run(method, None if is_none(into) else str(into))
        return {"method": method, **run, **settings}
    raise ConfigError(f"preset = {name!r}; there are recommended, paper and tuned.")
