"""Makes the scores of a heuristic that needs a calibration, before training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unmask.calibration.fisher import estimate_fisher
from unmask.calibration.pruning import connection_sensitivity, gradient_flow
from unmask.calibration.synflow import synaptic_flow
from unmask.errors import MethodError, NonFiniteGradientError
from unmask.methods.method import Method
from unmask.ranking.ledger import Layout

_DATA = {"fisher": estimate_fisher, "initial_snip": connection_sensitivity, "grasp": gradient_flow}


def estimates(model: nn.Module, layout: Layout, method: Method, budget: int) -> dict[int, Tensor]:
    """Computes the scores of a method whose heuristic needs a calibration, of a model that is not frozen yet.

    Returns:
        The scores by tensor index, each of the tensor's shape; empty for a heuristic that needs no calibration.

    Raises:
        MethodError: The calibration cannot use the data or the model, or every score is zero.
        NonFiniteGradientError: A score is not finite.
    """
    heuristic = method.heuristic
    if heuristic.needs != "calibration" or method.calibration is None:
        return {}
    if heuristic.name == "synflow":
        scores = synaptic_flow(model, layout, budget)
    else:
        scores = _DATA[heuristic.name](model, layout, method.calibration)
    for index, score in scores.items():
        if not torch.isfinite(score).all():
            raise NonFiniteGradientError(
                f"the {heuristic.name} score of {layout.names[index]!r} is not finite; look at the loader's labels, and at the "
                "weights."
            )
    if not any(score.any() for score in scores.values()):
        raise MethodError(
            f"{heuristic.name} is zero for every eligible weight, so it ranks nothing. A LoRA starts with B = 0, where a score "
            "of weight times gradient vanishes for A and for B alike: prune it by magnitude or at random with "
            "allocation='tensor', or start B away from zero (peft's init_lora_weights=False)."
        )
    return scores
