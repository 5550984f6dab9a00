"""Measures masks (tensor sparsity, densities, sparsity entropy, overlap) and counts the gradient updates of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from unmask.analysis.mask import Mask, mask_of
from unmask.delta.delta import SparseDelta
from unmask.errors import DeltaError, MethodError
from unmask.methods.method import Method
from unmask.methods.schedules import Schedule
from unmask.selection.selection import Selection

Source = Selection | SparseDelta | Mask


def tensor_sparsity(source: Source) -> float:
    """Returns the share of the tensors that hold no unmasked weight, 0 to 1.

    Raises:
        DeltaError: The delta does not say among how many tensors it was selected (earlier versions did not record it).

    Example:
        >>> from unmask.analysis import mask_over
        >>> tensor_sparsity(mask_over({"a": torch.tensor([0])}, {"a": (2, 2), "b": (4,), "c": (4,), "d": (4,)}))
        0.75
    """
    mask = mask_of(source)
    if mask.tensors is None:
        raise DeltaError(
            "this delta does not say among how many tensors it was selected; give them: "
            "unmask.analysis.mask_of(delta).like(model)."
        )
    return 1 - len(mask.indices) / mask.tensors if mask.tensors else 0.0


def densities(source: Source) -> dict[str, float]:
    """Returns the share of each known tensor's weights that are unmasked, 0 to 1, by name.

    Example:
        >>> from unmask.analysis import mask_over
        >>> densities(mask_over({"a": torch.tensor([0])}, {"a": (2, 2), "b": (4,)}))
        {'a': 0.25, 'b': 0.0}
    """
    return {name: n / of if of else 0.0 for name, (n, of) in mask_of(source).counts().items()}


def sparsity_entropy(source: Source, of: Literal["density", "share"] = "density") -> float:
    """Returns the Shannon entropy of the sparsity probability over tensors (arXiv 2408.14470, Sect. 6), in nats.

    It is ``-sum_k p_k ln p_k``. The paper's sparsity probability of tensor k is its density ``d_k = n_k / N_k``: n_k of its
    N_k weights are unmasked. Here the densities are divided by their sum, so that they are a distribution; the paper does not
    say how it normalises. The entropy is 0 if one tensor holds all, and ``ln K`` if K tensors are equally dense. Its
    exponential is the number of tensors that an even spread of this entropy would use.

    Args:
        source: A selection, a delta or a mask.
        of: ``"density"``: ``p_k = d_k / sum_j d_j``, in which tensors of all sizes count alike. ``"share"``:
            ``p_k = n_k / sum_j n_j``, the chance that an unmasked weight is one of tensor k's.

    Raises:
        MethodError: ``of`` is neither.

    Example:
        >>> from unmask.analysis import mask_over
        >>> mask = mask_over({"a": torch.arange(3), "b": torch.arange(1)}, {"a": (12,), "b": (4,)})
        >>> round(sparsity_entropy(mask), 4), round(sparsity_entropy(mask, of="share"), 4)
        (0.6931, 0.5623)
    """
    if of not in ("density", "share"):
        raise MethodError(f"of = {of!r}; it must be 'density' or 'share'.")
    counts = [(n, size) for n, size in mask_of(source).counts().values() if n]
    terms = [float(n) if of == "share" else n / size for n, size in counts]
    total = sum(terms)
    return -sum(x / total * math.log(x / total) for x in terms) + 0.0  # no -0.0


@dataclass(frozen=True)
class Overlap:
    """The agreement of two masks.

    Attributes:
        common: The number of weights that are unmasked in both.
        a: The number of weights that are unmasked in the first.
        b: The number of weights that are unmasked in the second.
        expected: The mean of ``common`` if each mask were drawn at random from its own tensors; None where these are not known.
    """

    common: int
    a: int
    b: int
    expected: float | None

    @property
    def jaccard(self) -> float:
        """The common weights over those unmasked in either mask, 0 to 1; 1 for two empty masks."""
        either = self.a + self.b - self.common
        return self.common / either if either else 1.0

    @property
    def of_a(self) -> float:
        """The share of the first mask that is in the second; 1 for an empty one."""
        return self.common / self.a if self.a else 1.0

    @property
    def of_b(self) -> float:
        """The share of the second mask that is in the first; 1 for an empty one."""
        return self.common / self.b if self.b else 1.0

    @property
    def times_chance(self) -> float | None:
        """The ratio of ``common`` to what chance would give; None where that is 0 or not known."""
        return self.common / self.expected if self.expected else None


def overlap(a: Source, b: Source) -> Overlap:
    """Counts the weights that two masks have in common, and those that they would have in common by chance.

    Raises:
        DeltaError: A tensor has different shapes in the two masks.

    Example:
        >>> from unmask.analysis import mask_over
        >>> shapes = {"a": (10,)}
        >>> both = overlap(mask_over({"a": torch.arange(4)}, shapes), mask_over({"a": torch.arange(2, 7)}, shapes))
        >>> both.common, both.jaccard, both.of_a, both.of_b, both.expected
        (2, 0.2857142857142857, 0.5, 0.4, 2.0)
    """
    one, two = mask_of(a), mask_of(b)
    shared = one.shapes.keys() & two.shapes.keys()
    for name in shared:
        if one.shapes[name] != two.shapes[name]:
            raise DeltaError(f"{name!r} has shape {one.shapes[name]} in one and {two.shapes[name]} in the other mask.")
    pairs = [(one.indices[name], two.indices[name]) for name in one.indices.keys() & two.indices.keys()]
    common = sum(int(torch.isin(x, y, assume_unique=True).sum()) for x, y in pairs)
    return Overlap(common, len(one), len(two), _expected(one, two, shared))


def _expected(a: Mask, b: Mask, shared: set[str]) -> float | None:
    """Sums ``|A| |B| / (N_A N_B)`` over the weights that could be in both masks."""
    if a.weights is None or b.weights is None or not a.weights or not b.weights:
        return None
    if len(a.shapes) == a.tensors and len(b.shapes) == b.tensors:
        both = sum(prod(a.shapes[name]) for name in shared)
    elif (a.tensors, a.weights) == (b.tensors, b.weights):  # two deltas of one scope
        both = a.weights
    else:
        return None
    return len(a) * len(b) * both / (a.weights * b.weights)


def gradient_updates(of: Method | Schedule, budget: int, steps: int | None = None) -> int:
    """Returns the number of scalar weight updates of a run: ``sum_{t<T} b(t)``, exact for any schedule and stride.

    For the uniform schedule with T dividing B this is ``B (T + 1) / 2``, against ``T B`` of a static mask: the paper's
    argument for increment-S.

    Args:
        of: A method or a schedule. Static selection and repeat-S update B weights at every step. Where repeat-S keeps the
            weights that leave, this counts the B weights that have a gradient, and not those that only momentum still moves.
        budget: B, as a count.
        steps: T, the number of steps of the run; None for those that the schedule plans (a static method plans none).

    Raises:
        MethodError: ``budget`` or ``steps`` is negative, or ``steps`` is missing.

    Example:
        >>> import unmask
        >>> gradient_updates(unmask.id3(budget=100, steps=10), 100), gradient_updates(unmask.pafi(100), 100, steps=10)
        (550, 1000)
    """
    if isinstance(of, Method) and of.whole:
        raise MethodError(f"{of.name} trains whole tensors: budget x steps updates, with no schedule.")
    if steps is None:
        if isinstance(of, Method) and of.strategy != "increment":
            raise MethodError(f"{of.name} plans no number of steps; give steps=, those that are run.")
        steps = (of.schedule if isinstance(of, Method) else of).steps
    for name, value in (("budget", budget), ("steps", steps)):
        if value < 0:
            raise MethodError(f"{name} = {value}; it must be 0 or more.")
    return sum(of.cumulative(t, budget) for t in range(steps))
