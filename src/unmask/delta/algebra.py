"""Adds the fields of several deltas to those of one delta, and takes a delta away from such a sum.

It works on fields, so that `unmask.delta.delta` can use it for its operators. A sum keeps in its metadata, under ``combined``,
what it was made of: the rule, and a *part* for each delta (its fingerprints, its metadata, how many weights it sets, and a digest
of each tensor that it stores whole). So a part can be taken away again, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.delta.contents import DeltaFields, Fields
from unmask.delta.fingerprint import digest, same_bits
from unmask.delta.rules import Part, Parts, Rule, combine_parts
from unmask.delta.sparse import SparseTensor
from unmask.errors import DeltaError
from unmask.reading import count, fields, items, mapping, plain, refusing, text

_SHARED = ("base_id", "parameters", "quantised", "versions", "into", "task")
"""The entries of the metadata that a sum keeps where all of its parts agree."""
_PART = fields({"base": text, "places": text, "weights": count, "whole": mapping(text), "metadata": mapping(plain)})
_COMBINED = fields({"parts": items(_PART)})


def add(
    deltas: Sequence[DeltaFields],
    rule: Rule,
    weights: Sequence[float],
    before: Sequence[Mapping[str, Tensor]] | None = None,
    heads: int | None = None,
) -> Fields:
    """Returns the fields of the sum of some deltas; see `unmask.combine`.

    Args:
        deltas: The deltas.
        rule: The rule for weights that several of them set.
        weights: A factor for each.
        before: For each delta, by tensor name, the base's values at its indices; None where the rule does not need them.
        heads: The number of the delta whose whole tensors stay where several have one of a name; None for a refusal.

    Raises:
        DeltaError: The deltas belong to several bases, or overlap in a way that the rule does not cover.
    """
    _check_same_base(deltas)
    parts: list[Parts] = [
        {
            name: Part(entry.indices.long(), entry.values, None if before is None else before[number][name])
            for name, entry in delta.sparse.items()
        }
        for number, delta in enumerate(deltas)
    ]
    if rule.name is None:
        _refuse_overlap(parts)
    whole = _whole_of(deltas, rule, heads)
    sparse = {}
    for name, part in combine_parts(parts, rule, weights).items():
        first = next(delta.sparse[name] for delta in deltas if name in delta.sparse)
        sparse[name] = SparseTensor(part.indices, part.values.to(first.values.dtype), first.shape)
    described = [part for delta in deltas for part in parts_of(delta, apart=rule.name is None)]
    if rule.name is None:
        described.sort(key=lambda part: json.dumps(part, sort_keys=True))
    how: dict[str, Any] = {"rule": rule.name, "parts": described}
    if rule.needs_base:
        how |= {"weights": list(weights), "density": rule.density, "majority": rule.majority, "seed": rule.seed}
    metadata = _metadata(how, sparse)
    if heads is not None and "task" in deltas[heads].metadata:
        metadata["task"] = deltas[heads].metadata["task"]
    known = [{"base": delta.base, "whole": delta.whole} for delta in deltas]  # of a sum, it may be known from a model
    return sparse, whole, _base_of([*known, *described], whole), metadata, ""


def subtract(total: DeltaFields, part: DeltaFields) -> Fields:
    """Returns the fields of what is left of a sum without one of its parts, or without several of them that were added.

    Raises:
        DeltaError: ``total`` is no sum that ``part`` belongs to, or cannot be taken apart.
    """
    described, away = parts_of(total, apart=True), parts_of(part, apart=True)
    left = list(described)
    for each in away:
        if each not in left:
            raise DeltaError(
                "the delta to take away is no part of the other: that one was not made of it by | or unmask.combine, or with a "
                "rule that mixes weights. Combine the others again instead."
            )
        left.remove(each)
    if not left:
        raise DeltaError("nothing would be left of the delta; a base without a delta needs no delta.")
    if sum(each["weights"] for each in described) != sum(entry.numel for entry in total.sparse.values()):
        raise DeltaError("the parts overlapped, so one of them cannot be taken away; combine the others again instead.")
    sparse = {}
    for name, entry in total.sparse.items():
        stay = torch.ones(entry.numel, dtype=torch.bool)
        if name in part.sparse:
            own = part.sparse[name]
            stay = ~torch.isin(entry.indices, own.indices)
            if int((~stay).sum()) != own.numel or not same_bits(entry.values[~stay], own.values):
                raise DeltaError(
                    f"the other delta holds other values of {name!r}, so this one is no part of it any more."
                )
        if stay.any():
            sparse[name] = SparseTensor(entry.indices[stay], entry.values[stay], entry.shape)
    digests = {name: own for each in left for name, own in each["whole"].items()}
    whole = {name: total.whole[name] for name in sorted(digests) if name in total.whole}
    missing = sorted(name for name, own in digests.items() if name not in whole or digest(whole[name]) != own)
    if missing:
        raise DeltaError(
            f"{missing[0]!r} is stored whole in what would be left, and was replaced by another delta's when they were combined "
            "(heads=); combine the others again instead."
        )
    if len(left) == 1:
        return sparse, whole, left[0]["base"], dict(left[0]["metadata"]), left[0]["places"]
    return sparse, whole, _base_of(left, whole), _metadata({"rule": None, "parts": left}, sparse), ""


def parts_of(delta: DeltaFields, apart: bool) -> list[dict[str, Any]]:
    """Describes a delta as one part of a sum; if ``apart``, a sum without a rule is described by its own parts."""
    held = delta.metadata.get("combined")
    if apart and isinstance(held, Mapping) and held.get("rule") is None:
        with refusing(DeltaError, "the delta's metadata", "Combine its parts again."):
            return list(_COMBINED(held, "combined")["parts"])
    weights = sum(entry.numel for entry in delta.sparse.values())
    whole = {name: digest(tensor) for name, tensor in sorted(delta.whole.items())}
    metadata = dict(delta.metadata)
    return [{"base": delta.base, "places": delta.places, "weights": weights, "whole": whole, "metadata": metadata}]


def _check_same_base(deltas: Sequence[DeltaFields]) -> None:
    """Refuses deltas that cannot all belong to one base, as far as they tell, or that give it other tensors."""
    known: dict[frozenset[str], str] = {}  # fingerprints compare only where the same tensors are left out of them
    seen: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for number, delta in enumerate(deltas):
        between = delta.metadata.get("between")
        if isinstance(between, Mapping) and (
            between.get("removed") or between.get("replaced") or any(between.get("renamed", {}).values())
        ):
            raise DeltaError(
                f"delta number {number} removes, replaces or renames tensors, which a sum cannot do; combine deltas that keep "
                "the base's tensors."
            )
        if delta.base and known.setdefault(frozenset(delta.whole), delta.base) != delta.base:
            raise DeltaError(
                f"delta number {number} was made on another base than one before it; combine deltas of one base."
            )
        for name, entry in delta.sparse.items():
            own = (tuple(entry.shape), entry.values.dtype)
            if seen.setdefault(name, own) != own:
                raise DeltaError(
                    f"{name!r} is {own[1]} of shape {own[0]} in delta number {number}, and {seen[name][1]} of shape "
                    f"{seen[name][0]} in one before it, so they belong to other bases; combine deltas of one base."
                )


def _refuse_overlap(parts: Sequence[Parts]) -> None:
    """Refuses weights that several deltas set."""
    overlap, first = 0, ""
    for name in sorted({name for each in parts for name in each}):
        together = torch.cat([each[name].indices for each in parts if name in each])
        twice = together.numel() - together.unique().numel()
        overlap, first = overlap + twice, first or (name if twice else "")
    if overlap:
        raise DeltaError(
            f"the deltas overlap in {overlap:,} weights, the first of them in {first!r}, so their sum needs a rule: "
            "unmask.combine(a, b, rule='mean'), or 'last', 'ties' and others. Deltas that were trained with "
            "unmask.select(..., avoid=[other]) do not overlap."
        )


def _whole_of(deltas: Sequence[DeltaFields], rule: Rule, heads: int | None) -> dict[str, Tensor]:
    """Returns the tensors that the sum stores whole."""
    whole: dict[str, Tensor] = {}
    for name in sorted({name for delta in deltas for name in delta.whole}):
        owners = [number for number, delta in enumerate(deltas) if name in delta.whole]
        found = [deltas[number].whole[name] for number in owners]
        in_part = [number for number, delta in enumerate(deltas) if name in delta.sparse]
        if any(number not in owners for number in in_part):
            raise DeltaError(
                f"{name!r} is stored whole in one delta and in part in another, so they cannot be combined; train the later one "
                "with unmask.select(..., avoid=[other])."
            )
        if all(same_bits(found[0], other) for other in found[1:]):
            whole[name] = found[0]
        elif in_part:
            raise DeltaError(
                f"{name!r} is a tensor that the base lacks, and started at other values in each delta, so their single weights "
                "do not go together; train them from one random init (one seed)."
            )
        elif heads in owners:
            whole[name] = deltas[heads].whole[name]
        elif rule.name == "last":
            whole[name] = found[-1]
        else:
            raise DeltaError(
                f"{name!r} is stored whole in deltas number {' and '.join(map(str, owners))}, with other values in each, as the "
                "heads of several tasks are. Say whose is kept: unmask.combine(a, b, heads=a) is the model of a's task, and with "
                "heads=b that of b's; all other weights are the same in both."
            )
    return whole


def _base_of(parts: Sequence[Mapping[str, Any]], whole: Mapping[str, Tensor]) -> str:
    """Returns the base's fingerprint, if a part stores the same tensors whole as the sum does; else it is not known."""
    return next((part["base"] for part in parts if part["base"] and part["whole"].keys() == whole.keys()), "")


def _metadata(how: Mapping[str, Any], sparse: Mapping[str, SparseTensor]) -> dict[str, Any]:
    """Returns the metadata of a sum: what all parts agree on, how many weights it sets, and how it was made."""
    every = [part["metadata"] for part in how["parts"]]
    agreed = [key for key in _SHARED if all(key in each and each[key] == every[0][key] for each in every)]
    used = sum(entry.numel for entry in sparse.values())
    return {key: every[0][key] for key in agreed} | {"used": used, "combined": dict(how)}
