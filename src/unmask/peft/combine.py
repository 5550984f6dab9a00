"""Combines several adapters into one, by the rules that `unmask.combine` has for deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from unmask.delta.rules import Majority, Part, Rule, combine_parts
from unmask.errors import DeltaError
from unmask.peft.adapter import Adapter

Combination = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
"""The combination types of PEFT that have a meaning for single weights; ``cat`` and ``svd`` are about matrices of low rank."""


def rule_of(combination_type: Combination, density: float | None, majority: Majority, seed: int) -> Rule:
    """Returns the rule of a combination type. What cannot work is a ValueError, as in PEFT."""
    if combination_type not in get_args(Combination):
        raise ValueError(
            f"combination_type = {combination_type!r}; deltas of single weights combine by {', '.join(get_args(Combination))}."
        )
    try:
        return Rule(combination_type, None if combination_type == "linear" else density, majority, seed)
    except DeltaError as error:
        raise ValueError(str(error)) from error


def refuse_combination(
    adapters: Sequence[str], weights: Sequence[float], adapter_name: str, present: Sequence[str]
) -> None:
    """Refuses a combination that cannot be made; ``present`` names the adapters that exist."""
    unknown = [name for name in adapters if name not in present]
    if unknown or not adapters:
        raise ValueError(f"adapters = {adapters}; there are {list(present)}.")
    if len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights; give one weight for each adapter.")
    if adapter_name in present:
        raise ValueError(f"Adapter with name {adapter_name!r} already exists; delete_adapter({adapter_name!r}) first.")


def combined_adapter(parts: Sequence[Adapter], weights: Sequence[float], rule: Rule) -> Adapter:
    """Returns the combination as an adapter whose budget is used up: it selects nothing more. The sums are in float64."""
    parameters: dict[str, nn.Parameter] = {}
    held: list[dict[str, Part]] = []
    for part in parts:
        slots = part.slots()
        held.append({})
        for index, flat, places in part.layout.split(slots.positions[: slots.used]):
            name = part.layout.names[index]
            parameters[name] = cast(nn.Parameter, part.layout.tensors[index])
            held[-1][name] = Part(flat.cpu(), slots.values[places].cpu(), slots.base[places].cpu())
    entries = combine_parts(held, rule, weights)
    parameters = {name: parameters[name] for name in entries}
    used = sum(entry.indices.numel() for entry in entries.values())
    if not used:  # no adapter has selected anything yet
        parameters = {parts[0].layout.names[0]: cast(nn.Parameter, parts[0].layout.tensors[0])}
    owners = {name.rpartition(".")[0] for name in parameters}
    config = replace(
        parts[0].config,
        method="id3",
        budget=max(1, used),
        total_steps=1,
        target_modules=None if "" in owners else sorted(owners),
        exclude_modules=None,
        modules_to_save=sorted({module for part in parts for module in part.config.modules_to_save or ()}) or None,
        allocation="global",
        record=None,
    )
    combined = Adapter(config, max(1, used), dict(sorted(parameters.items())))
    slots, end = combined.slots(), 0
    for start, entry in zip(combined.layout.starts, entries.values(), strict=False):
        assert entry.base is not None, "an adapter knows its base"
        first, end = end, end + entry.indices.numel()
        slots.positions[first:end] = (entry.indices + start).to(slots.positions)
        slots.base[first:end] = entry.base.to(slots.base)
        slots.values[first:end] = entry.values.to(slots.values)
    combined.load(replace(slots, used=used, step=1))
    return combined


@torch.no_grad()
def combine_whole(
    parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Adds up the weighted changes of tensors that adapters set whole; of integer tensors it takes the last adapter's."""
    combined: dict[str, Tensor] = {}
    for name in sorted({name for part in parts for name in part}):
        before = base[name].to(torch.float64)
        total = before.clone()
        for part, weight in zip(parts, weights, strict=True):
            if name in part:
                own = part[name].to(before)
                total = total + weight * (own - before) if base[name].is_floating_point() else own
        combined[name] = total.to(base[name].dtype)
    return combined
