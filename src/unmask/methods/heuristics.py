"""Heuristics: functions (weight, gradient) -> score that say which scalar weights are unmasked first, those of the highest."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from unmask.errors import MethodError
from unmask.reading import choices

if TYPE_CHECKING:
    from torch import Tensor

Needs = Literal["gradient", "weight", "calibration", "nothing"]
Score = Callable[..., "Tensor"]


@dataclass(frozen=True)
class Heuristic:
    """A named score function with its parameters.

    Attributes:
        name: The name in the registry, e.g. ``"d3"``.
        function: ``function(weight, gradient, **parameters) -> score``. All three tensors have one shape, with any number of
            dimensions.
        needs: What the score depends on: ``"gradient"``, the gradient of the current step; ``"weight"``, the weight alone;
            ``"calibration"``, an estimate that ``unmask.select`` makes before training; or ``"nothing"``, a seed alone.
        parameters: The keyword arguments that are bound to the function, e.g. ``{"eps": 1.0, "exp": 2.0}``.
        elementwise: True if an entry's score depends on that entry alone. If False, the function sees whole tensors.
        ceiling: ``ceiling(weight, **parameters) -> f`` with ``0 <= score <= f |g|`` for every entry of that block of
            weights, up to rounding; None if there is no such bound. With it most entries can be skipped by ``|g|`` alone. It
            also says that entries with a score of 0 are not selected (see `floor`).
    """

    name: str
    function: Score
    needs: Needs = "gradient"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    elementwise: bool = True
    ceiling: Callable[..., float] | None = None

    @property
    def floor(self) -> float:
        """The score that an entry must exceed to be selected: 0 where a zero gradient makes the score 0, else -inf.

        Example:
            >>> heuristic("d3").floor, heuristic("small_magnitude").floor
            (0.0, -inf)
        """
        return 0.0 if self.ceiling is not None and self.elementwise and self.needs == "gradient" else -math.inf

    @property
    def seed(self) -> int:
        """Returns the seed of a random heuristic; 0 if none was given."""
        return int(self.parameters.get("seed", 0))

    def bound(self, weight: Tensor) -> float | None:
        """Returns ``f`` of ``0 <= score <= f |g|`` over a block of weights; None if no positive finite ``f`` is known."""
        if self.ceiling is None or not self.elementwise:
            return None
        factor = self.ceiling(weight, **self.parameters)
        return factor if 0 < factor < math.inf else None

    def score(self, weight: Tensor, gradient: Tensor | None, place: tuple[int, ...] = ()) -> Tensor:
        """Scores one block of a tensor.

        Args:
            weight: The weights, of any shape and float dtype; bfloat16 and float16 are scored in float32.
            gradient: The gradient, of the weight's shape; None for a heuristic that needs none.
            place: The step, the tensor's number and the block's first position. They seed a random heuristic.

        Returns:
            The scores, of shape ``weight.shape``, in float32 (float64 for float64 weights).
        """
        if self.needs == "nothing":
            return self.function(weight, self.seed, *place)
        gradient = None if gradient is None else _at_least_float32(gradient)
        return self.function(_at_least_float32(weight), gradient, **self.parameters)


def _at_least_float32(tensor: Tensor) -> Tensor:
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()


def d3(weight: Tensor, gradient: Tensor, eps: float = 1.0, exp: float = 2.0) -> Tensor:
    """Computes D3, eq. 1 of arXiv 2408.14470: ``|g| / (|w| + eps) ** exp``.

    With ``exp=0`` it is the gradient's magnitude. The paper's Table 7a uses ``exp=2`` for NLU and NER and ``exp=0`` for
    generation, with ``eps=1``; its Fig. 4 finds ``eps=0.5`` and ``exp=-1`` best. Theorem 1, that the root of the Fisher
    information is at least the mean score, holds for ``eps >= 1`` and ``exp >= 0`` (docs/methods.md).

    Example:
        >>> import torch
        >>> d3(torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 1.0])).tolist()
        [1.0, 0.25]
    """
    if exp == 0:
        return gradient.abs()
    return gradient.abs() / (weight.abs() + eps) ** exp


def largest(tensor: Tensor) -> float:
    """Returns the largest magnitude; NaN if there is one."""
    low, high = (x.item() for x in tensor.aminmax())
    return max(-low, high)


def _d3_ceiling(weight: Tensor, eps: float = 1.0, exp: float = 2.0) -> float:
    if exp == 0:
        return 1.0
    if eps <= 0:
        return math.inf
    return float(eps**-exp) if exp > 0 else float((largest(weight) + eps) ** -exp)


def gradient_magnitude(weight: Tensor, gradient: Tensor) -> Tensor:
    """Computes the gradient's magnitude, ``|g|``."""
    return gradient.abs()


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """Computes SNIP's connection sensitivity, ``|g * w|`` (arXiv 1810.02340)."""
    return (gradient * weight).abs()


def small_magnitude(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """Computes ``-|w|``, which puts the smallest weights first, as PaFi does (arXiv 2305.16742)."""
    return -weight.abs()


def large_magnitude(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """Computes ``|w|``, which puts the largest weights first, as magnitude pruning does."""
    return weight.abs()


def calibrated(weight: Tensor, estimate: Tensor) -> Tensor:
    """Returns a score that was estimated before training. It is passed in the place of the gradient."""
    return estimate


def random_score(weight: Tensor, seed: int = 0, step: int = 0, tensor: int = 0, first: int = 0) -> Tensor:
    """Draws uniform scores in [0, 1), on the CPU. They depend on the seed, the step, the tensor's number and the flat index.

    Under the allocation ``"global"`` a selection before training does not use them: it draws the positions themselves.
    """
    import torch

    from unmask.methods.draw import uniform

    scores = torch.from_numpy(uniform(weight.numel(), first, seed, step, tensor))
    return scores.view(weight.shape).to(weight.device)


def constant(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """Returns zeros. All weights then tie, and the order of tensor names and flat indices decides (BitFit under a budget)."""
    return weight.new_zeros(weight.shape)


_REGISTRY: dict[str, Heuristic] = {
    h.name: h
    for h in (
        Heuristic("d3", d3, ceiling=_d3_ceiling),
        Heuristic("gradient", gradient_magnitude, ceiling=lambda weight: 1.0),
        Heuristic("snip", snip, ceiling=largest),
        Heuristic("small_magnitude", small_magnitude, needs="weight"),
        Heuristic("large_magnitude", large_magnitude, needs="weight"),
        Heuristic("fisher", calibrated, needs="calibration"),  # arXiv 2111.09839
        Heuristic("initial_snip", calibrated, needs="calibration"),  # arXiv 1810.02340
        Heuristic("grasp", calibrated, needs="calibration"),  # arXiv 2002.07376
        Heuristic("synflow", calibrated, needs="calibration"),  # arXiv 2006.05467
        Heuristic("random", random_score, needs="nothing"),
        Heuristic("constant", constant, needs="weight"),
    )
}
_BUILT_IN = frozenset(_REGISTRY)
_RENAMED = {"magnitude": "small_magnitude"}


def register_heuristic(
    name: str, function: Score, *, needs: Needs = "gradient", elementwise: bool = True, overwrite: bool = False
) -> Heuristic:
    """Registers your own heuristic under a name, and returns it.

    Args:
        name: A new name. A name in use is refused, except where both functions are defined in ``__main__``: a cell of a
            notebook can be run again.
        function: ``function(weight, gradient) -> score``. The score has the weight's shape; the highest are unmasked first.
        needs: ``"gradient"`` or ``"weight"``.
        elementwise: False if a score depends on other entries of the tensor (on row norms, say).
        overwrite: Replace a heuristic that was registered under this name before. The library's own cannot be replaced.

    Raises:
        MethodError: The name is taken, or ``needs`` is neither.

    Example:
        >>> wanda = register_heuristic("gradient_over_weight", lambda w, g: g.abs() / w.abs().clamp_min(1e-8))
        >>> heuristic("gradient_over_weight") is wanda
        True
    """
    if name in _BUILT_IN or name in _RENAMED:
        raise MethodError(
            f"heuristic {name!r} is the library's own; take another name than {', '.join(sorted({*_REGISTRY, *_RENAMED}))}."
        )
    again = name in _REGISTRY and _REGISTRY[name].function.__module__ == function.__module__ == "__main__"
    if name in _REGISTRY and not (overwrite or again):
        raise MethodError(
            f"heuristic {name!r} is already registered; give overwrite=True, or take another name than "
            f"{', '.join(heuristic_names())}."
        )
    if needs not in ("gradient", "weight"):
        raise MethodError(f"needs = {needs!r}; a registered heuristic needs 'gradient' or 'weight'.")
    _REGISTRY[name] = Heuristic(name, function, needs=needs, elementwise=elementwise)
    return _REGISTRY[name]


def heuristic(which: str | Heuristic, **parameters: Any) -> Heuristic:
    """Looks a heuristic up by its name and binds parameters to it.

    Args:
        which: The name, or a heuristic to bind further parameters to.
        **parameters: Finite numbers, e.g. ``eps=0.5`` for ``"d3"`` or ``seed=1`` for ``"random"``.

    Raises:
        MethodError: There is no such heuristic, or it has no such parameter.

    Example:
        >>> heuristic("d3", exp=0.0).parameters
        {'exp': 0.0}
    """
    if isinstance(which, str):
        if which in _RENAMED:
            raise MethodError(
                f"heuristic {which!r} is called {_RENAMED[which]!r} here: the smallest weights come first."
            )
        if which not in _REGISTRY:
            raise MethodError(f"unknown heuristic {which!r}; there are {choices(which, heuristic_names())}.")
        which = _REGISTRY[which]
    if not parameters:
        return which
    allowed = ["seed"] if which.needs == "nothing" else list(inspect.signature(which.function).parameters)[2:]
    unknown = sorted(parameters.keys() - set(allowed))
    if unknown:
        raise MethodError(
            f"heuristic {which.name!r} has no parameter {unknown[0]!r}; it has {', '.join(allowed) or 'none'}."
        )
    for name, value in parameters.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MethodError(f"heuristic {which.name!r} has {name} = {value!r:.80}; it must be a finite number.")
        if which.needs == "nothing" and value != int(value):
            raise MethodError(f"heuristic {which.name!r} has {name} = {value!r}; a seed must be a whole number.")
    return dataclasses.replace(which, parameters={**which.parameters, **parameters})


def heuristic_names() -> list[str]:
    """Returns the names of all registered heuristics, sorted."""
    return sorted(_REGISTRY)
