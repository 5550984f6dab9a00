"""Selections that a quantised weight cannot be part of, refused before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from unmask.errors import MethodError
from unmask.methods.method import Method
from unmask.quantised.sources import sources


def refuse_quantised(
    model: nn.Module, method: Method, eligible: Sequence[str], new: Callable[[], Iterable[str]]
) -> None:
    """Refuses what needs a quantised matrix whole.

    Args:
        model: Any module.
        method: What is to be unmasked.
        eligible: Names of the tensors that are trained, of the budget or whole.
        new: Tells the names of the tensors that the base checkpoint lacks; asked only if something is quantised.

    Raises:
        MethodError: The method trains whole tensors, calibrates or prunes one, or a new tensor is quantised.
    """
    quantised = sources(model)
    if not quantised:
        return
    budgeted = sorted(quantised.keys() & eligible)
    if method.whole and budgeted:
        raise MethodError(f"{budgeted[0]!r} is quantised and cannot be trained whole; leave it out with exclude=.")
    if method.heuristic.needs == "calibration" and budgeted:
        raise MethodError(
            f"{budgeted[0]!r} is quantised, and the calibration of {method.heuristic.name!r} would take one float per weight of "
            "it; leave it out with exclude=, or take another method, such as unmask.static_d3."
        )
    fresh = sorted(quantised.keys() & set(new()))
    if fresh:
        raise MethodError(
            f"{fresh[0]!r} is quantised but not in the base checkpoint, and a delta cannot carry quantised weights; keep new "
            "layers out of the quantisation (transformers: llm_int8_skip_modules=[...] or modules_to_not_convert=[...])."
        )
