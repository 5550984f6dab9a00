"""Combines deltas of several tasks into one: `combine`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from unmask.delta.algebra import add
from unmask.delta.base import base_tensors
from unmask.delta.delta import SparseDelta
from unmask.delta.fingerprint import digest, fingerprint, fingerprint_at
from unmask.delta.rules import Majority, Rule, RuleName
from unmask.errors import DeltaError
from unmask.gradients.entries import take


def combine(
    *deltas: SparseDelta,
    rule: RuleName | None = None,
    weights: Sequence[float] | None = None,
    base: nn.Module | None = None,
    density: float | None = None,
    majority: Majority = "total",
    seed: int = 0,
    heads: SparseDelta | None = None,
) -> SparseDelta:
    """Combines deltas of one base into one delta.

    A delta holds values. What it changes a weight by, the *change*, is the value less the base's; rules that compute with changes
    need the base. A weight that a single delta sets keeps its value bit for bit under every rule, unless pruning or a factor
    changes it. So deltas over disjoint weights add exactly, in any order. The rules for a weight that several deltas set:

    - None: it is refused.
    - ``"last"``: the last delta's value.
    - ``"mean"``: the mean of the values of the deltas that set it.
    - ``"linear"``: the base's value plus the sum of the changes, each times its delta's factor (task arithmetic).
    - ``"magnitude_prune"``: as ``"linear"``, after each delta has kept only its changes of the largest magnitude: the share
      ``density`` of all weights that it sets, rounded up. The first of equal ones, in order of tensor name and index, stay.
    - ``"ties"``: TIES-Merging (arXiv 2306.01708). *Trim*: each delta keeps changes as under ``"magnitude_prune"``. *Elect*: the
      weight's sign is that of the sum of the trimmed changes (``majority="total"``), or of the sum of their signs
      (``"frequency"``); a sum of 0 counts as positive. *Merge*: the mean of the changes of this sign alone, each times its
      delta's factor, is added to the base's value. In the paper there is one factor, lambda, for all.
    - ``"dare_linear"``: DARE (arXiv 2311.03099). Each delta drops each of its changes with the probability ``1 - density``, and
      the others are divided by ``density``, so that the expected change is the same. They are then summed as under ``"linear"``.
    - ``"dare_ties"``: DARE in the place of TIES's trimming.

    A weight that pruning takes from every delta is the base's. ``docs/delta.md`` has the use with several tasks.

    Args:
        *deltas: The deltas, at least one. A sum may be one of them.
        rule: The rule for weights that several of them set.
        weights: A factor for each delta, for the rules from ``"linear"`` on; None for 1 each.
        base: A model that holds the base, for the rules from ``"linear"`` on. It is only read.
        density: The share of each delta's weights that pruning keeps, above 0 and at most 1.
        majority: How TIES elects a sign.
        seed: The seed of DARE. The j-th weight of delta number k (both from 0), its tensors in order of name, stays if the j-th
            number of `unmask.methods.draw.uniform` for the seeds (``seed``, k) is below ``density``.
        heads: One of the deltas. Where several store a tensor of the same name whole, such as each task's own head, this one's
            is kept. Without it only ``"last"`` covers such tensors.

    Returns:
        The combined delta. Its metadata name its parts (``combined``), so that ``sum - part`` can give the rest back. The order
        of unmasking is not kept.

    Raises:
        DeltaError: The deltas belong to several bases, the model is not their base, they overlap without a rule, or an argument
            is not allowed.

    Example:
        >>> import torch, unmask
        >>> def tuned(value, at):
        ...     entry = unmask.SparseTensor(torch.tensor(at), torch.full((len(at),), value), (4,))
        ...     return unmask.SparseDelta({"w": entry}, {}, "sha256:0", {"note": value})
        >>> a, b = tuned(2.0, [0, 1]), tuned(4.0, [1, 2])
        >>> unmask.combine(a, b, rule="mean").sparse["w"].values.tolist()
        [2.0, 3.0, 4.0]
    """
    for each in deltas:
        if not isinstance(each, SparseDelta):
            raise DeltaError(f"combine got a {type(each).__name__}; give deltas: unmask.combine(a, b).")
    if not deltas:
        raise DeltaError("combine got no delta; give at least one.")
    chosen = Rule(rule, density, majority, seed)
    factors = [1.0] * len(deltas) if weights is None else list(weights)
    if weights is not None and not chosen.needs_base:
        raise DeltaError(f"weights = {list(weights)!r:.80} go with the rules that sum changes, not with rule {rule!r}.")
    if len(factors) != len(deltas) or not all(isinstance(f, int | float) and math.isfinite(f) for f in factors):
        raise DeltaError(f"weights = {factors!r:.80}; give one finite number for each of the {len(deltas)} deltas.")
    number = next((k for k, each in enumerate(deltas) if each is heads), None)
    if heads is not None and number is None:
        raise DeltaError("heads must be one of the deltas that are combined.")
    if chosen.needs_base and base is None:
        raise DeltaError(f"rule {rule!r} computes with changes, which are differences to the base: give base=model.")
    if base is None:
        return SparseDelta(*add(deltas, chosen, factors, None, number))
    tensors = base_tensors(base)
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    before = [_before(delta, k, tensors, digests) for k, delta in enumerate(deltas)]
    sparse, whole, known, metadata, _ = add(deltas, chosen, factors, before, number)
    known = known or _fingerprint_without(digests, whole)
    inside = {name: entry for name, entry in sparse.items() if name not in whole}
    places = fingerprint_at({n: e.holding(take(tensors[n], e.indices).cpu()) for n, e in inside.items()})
    return SparseDelta(sparse, whole, known, metadata, places)


def _before(
    delta: SparseDelta, number: int, tensors: Mapping[str, Tensor], digests: Mapping[str, str]
) -> dict[str, Tensor]:
    """Returns what the weights that a delta sets are without it, by tensor name; refuses a model that is not its base."""
    delta.check_places(tensors)
    if delta.base and _fingerprint_without(digests, delta.whole) != delta.base:
        raise DeltaError(
            f"the model given as base= is not the base of delta number {number}; load that base, unmodified."
        )
    return {
        name: take(delta.whole[name] if name in delta.whole else tensors[name], entry.indices).cpu()
        for name, entry in delta.sparse.items()
    }


def _fingerprint_without(digests: Mapping[str, str], whole: Mapping[str, Tensor]) -> str:
    """Returns the fingerprint of a base's tensors that are not stored whole."""
    return fingerprint({name: own for name, own in digests.items() if name not in whole})
