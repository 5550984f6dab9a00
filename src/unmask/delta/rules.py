"""Combines the weights that several deltas set, by a rule for those that more than one sets: pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unmask.errors import DeltaError
from unmask.methods.draw import uniform

RuleName = Literal["last", "mean", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
Majority = Literal["total", "frequency"]
_PRUNING = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
_TIES = ("ties", "dare_ties")


@dataclass(frozen=True)
class Part:
    """The weights of one tensor that one delta sets.

    Attributes:
        indices: (n,) int64 flat indices, ascending.
        values: (n,) their values, in any float dtype.
        base: (n,) what the weights are without the delta; None where that is not known.
    """

    indices: Tensor
    values: Tensor
    base: Tensor | None = None


Parts = Mapping[str, Part]
"""The weights that one delta sets, by tensor name."""


@dataclass(frozen=True)
class Rule:
    """The rule for a weight that several deltas set; `unmask.combine` explains the rules.

    Attributes:
        name: The rule's name; None refuses such weights.
        density: The share of each delta's weights that pruning keeps.
        majority: How ``"ties"`` and ``"dare_ties"`` elect a sign: by the ``"total"`` of the changes, or by ``"frequency"``.
        seed: The seed of DARE's random drop.

    Raises:
        DeltaError: There is no such rule, or a setting is missing, out of range or does not go with the rule.
    """

    name: RuleName | None = None
    density: float | None = None
    majority: Majority = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in get_args(RuleName):
            raise DeltaError(f"rule = {self.name!r:.80}; it must be None or one of {', '.join(get_args(RuleName))}.")
        if self.majority not in get_args(Majority):
            raise DeltaError(f"majority = {self.majority!r:.80}; it must be 'total' or 'frequency'.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise DeltaError(f"seed = {self.seed!r:.80}; it must be a whole number.")
        if self.name in _PRUNING:
            number = self.density
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 1:
                raise DeltaError(
                    f"density = {number!r:.80}; rule {self.name!r} needs the share of each delta's weights that it keeps, above "
                    "0 and at most 1, such as density=0.5."
                )
        elif self.density is not None:
            raise DeltaError(f"density = {self.density!r:.80} goes with {', '.join(_PRUNING)}, not with {self.name!r}.")

    @property
    def needs_base(self) -> bool:
        """True if the rule computes with changes, which are differences to the base."""
        return self.name not in (None, "last", "mean")


def combine_parts(deltas: Sequence[Parts], rule: Rule, weights: Sequence[float]) -> dict[str, Part]:
    """Returns the weights that the combined delta sets, by tensor name; see `unmask.combine`.

    Sums are in float64, and so are the values that come back, except that a weight which a single delta sets with the factor 1
    keeps its value bit for bit.

    Args:
        deltas: What each delta sets; for a rule that needs the base, with the base's values.
        rule: The rule. None must have been ruled out where two deltas set a weight.
        weights: The factor of each delta's changes, for a rule that needs the base.

    Example:
        >>> one = {"w": Part(torch.tensor([0, 1]), torch.tensor([2.0, 4.0]))}
        >>> other = {"w": Part(torch.tensor([1, 3]), torch.tensor([6.0, 8.0]))}
        >>> both = combine_parts([one, other], Rule("mean"), [1.0, 1.0])["w"]
        >>> both.indices.tolist(), both.values.tolist()
        ([0, 1, 3], [2.0, 5.0, 8.0])
    """
    kept = [_kept(parts, rule, number) for number, parts in enumerate(deltas)]
    factor = 1 / rule.density if rule.name in ("dare_linear", "dare_ties") and rule.density else 1.0
    combined = {}
    for name in sorted({name for parts in deltas for name in parts}):
        here = [(k, parts[name], kept[k][name]) for k, parts in enumerate(deltas) if name in parts]
        indices = torch.cat([part.indices for _, part, _ in here]).unique()
        present = torch.zeros(len(here), indices.numel(), dtype=torch.bool)
        values = torch.zeros(len(here), indices.numel(), dtype=torch.float64)
        base = torch.zeros(indices.numel(), dtype=torch.float64)
        for row, (_, part, keep) in enumerate(here):
            at = torch.searchsorted(indices, part.indices)
            present[row, at], values[row, at] = keep, part.values.double()
            if part.base is not None:
                base[at] = part.base.double()
        scales = torch.tensor([[weights[k]] for k, _, _ in here], dtype=torch.float64)
        left = present.any(0)
        merged = _merged(present, values, base, rule, scales, factor)
        known = any(part.base is not None for _, part, _ in here)
        combined[name] = Part(indices[left], merged[left], base[left] if known else None)
    return {name: part for name, part in combined.items() if part.indices.numel()}


def _merged(present: Tensor, values: Tensor, base: Tensor, rule: Rule, weights: Tensor, factor: float) -> Tensor:
    """Returns the combined values (n,) of the weights of one tensor.

    Args:
        present: (deltas, n) bool: which delta sets which weight, after pruning.
        values: (deltas, n) float64.
        base: (n,) float64.
        rule: The rule.
        weights: (deltas, 1) float64.
        factor: What pruning multiplies changes by.
    """
    count = present.sum(0)
    places = torch.arange(len(present), dtype=torch.int64)[:, None].expand_as(present)
    last = values.gather(0, torch.where(present, places, -1).amax(0, keepdim=True).clamp(min=0)).squeeze(0)
    if rule.name in (None, "last"):
        return last
    if rule.name == "mean":
        return torch.where(count == 1, last, (values * present).sum(0) / count.clamp(min=1))
    changes = (values - base) * factor * present
    counted = present
    if rule.name in _TIES:
        votes = changes if rule.majority == "total" else changes.sign()
        elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        counted = present & (changes.sign() == elected)
    total = (changes * weights * counted).sum(0)
    if rule.name in _TIES:
        total = total / counted.sum(0).clamp(min=1)
    unscaled = (present & (weights * factor == 1)).sum(0)
    return torch.where((count == 1) & (unscaled == 1), last, base + total)


def _kept(parts: Parts, rule: Rule, number: int) -> dict[str, Tensor]:
    """Returns by tensor which of a delta's weights pruning keeps, (n,) bool; ``number`` is the delta's place among all."""
    names = sorted(parts)
    sizes = [parts[name].indices.numel() for name in names]
    if rule.density is None:
        keep = torch.ones(sum(sizes), dtype=torch.bool)
    elif rule.name in ("dare_linear", "dare_ties"):
        keep = torch.from_numpy(uniform(sum(sizes), 0, rule.seed, number)) < rule.density
    else:
        changes = [(parts[name].values.double() - _base_of(parts[name])).abs() for name in names]
        keep = torch.zeros(sum(sizes), dtype=torch.bool)
        if changes:
            order = torch.cat(changes).argsort(descending=True, stable=True)
            keep[order[: math.ceil(rule.density * sum(sizes) - 1e-9)]] = True
    return dict(zip(names, keep.split(sizes), strict=True))


def _base_of(part: Part) -> Tensor:
    assert part.base is not None, "a rule that prunes by magnitude needs the base"
    return part.base.double()
