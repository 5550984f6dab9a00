"""The recommended recipe: the settings of a run that names no method.

The recipe was chosen in experiments/study. docs/results.md has the figures, and says where the recipe loses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unmask.lab.tasks.names import TASKS

RECIPE: Mapping[str, Any] = MappingProxyType(
    {"method": "random_mask", "scope": "linear", "lr": "auto", "dense_lr": "auto"}
)
"""The recipe in the base itself. `rate` gives the number for ``lr``, `head_rate` that for ``dense_lr``."""
INSIDE_LORA: Mapping[str, Any] = MappingProxyType({"method": "random_mask", "lr": "auto", "dense_lr": "auto"})
"""The recipe inside a LoRA."""


def recommended(task: str | None, into: str | None) -> Mapping[str, Any]:
    """Returns the settings of a run that names no method. Your own texts have the task None.

    They are the recipe, except where it was not studied or was behind: inside added modules other than a LoRA, and on word
    problems, the method is ID3 as published.

    Example:
        >>> recommended("cola", None)["method"], recommended("gsm8k", None)["method"], recommended("cola", "dora")["method"]
        ('random_mask', 'id3', 'id3')
    """
    if into not in (None, "lora") or (task is not None and TASKS.get(task) == "generation"):
        return {"method": "id3"}
    return RECIPE if into is None else INSIDE_LORA


def rate(share: float, inside: bool = False) -> float:
    """Returns the recipe's peak learning rate: 1e-2 for 0.2% of the weights, in inverse proportion to the share's root.

    Adam moves each weight about as far in a step, so with this rate a layer's output moves about as far at every budget. The
    rate is at most 3e-2, the largest that was best in the study (at 0.05%). Inside added modules, where 3e-2 diverged in the
    study of LoRA, it is at most 1e-2. ``share`` is the budget as a share of the model's weights, above 0.

    Example:
        >>> rate(0.002), round(rate(0.01), 5), rate(1e-5)
        (0.01, 0.00447, 0.03)
    """
    return min(0.01 if inside else 0.03, 0.01 * math.sqrt(0.002 / share))


def head_rate(lr: float, matrices: int) -> float:
    """Returns the recipe's peak learning rate for a head of so many ``matrices``, which is trained outside the budget.

    A head of one layer is best at the mask's own rate ``lr``. A head with a hidden layer diverges at the high learning rates
    that suit a sparse mask, because whole rows move at once. It is therefore trained at 1e-3 or less.

    Example:
        >>> head_rate(1e-2, 1), head_rate(1e-2, 2), head_rate(3e-4, 2)
        (0.01, 0.001, 0.0003)
    """
    return lr if matrices < 2 else min(lr, 1e-3)
