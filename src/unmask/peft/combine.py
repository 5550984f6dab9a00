"""Combines several adapters into one: base + sum of w_i (adapter_i - base), at every weight that one of them sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from unmask.peft.adapter import Adapter


def refuse_combination(
    adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str, present: Sequence[str]
) -> None:
    """Refuses a combination that cannot be made; ``present`` names the adapters that exist."""
    unknown = [name for name in adapters if name not in present]
    if unknown or not adapters:
        raise ValueError(f"adapters = {adapters}; there are {list(present)}.")
    if len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights; give one weight for each adapter.")
    if adapter_name in present:
        raise ValueError(f"Adapter with name {adapter_name!r} already exists; delete_adapter({adapter_name!r}) first.")
    if combination_type != "linear":
        raise ValueError(f"combination_type = {combination_type!r}; deltas of single weights combine 'linear' only.")


def combined_adapter(parts: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Returns the combination as an adapter whose budget is used up: it selects nothing more. The sums are in float64."""
    parameters: dict[str, nn.Parameter] = {}
    held: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}  # by tensor: flat indices, base weights, weighted changes
    for part, weight in zip(parts, weights, strict=True):
        slots = part.slots()
        for index, flat, places in part.layout.split(slots.positions[: slots.used]):
            name, before = part.layout.names[index], slots.base[places].double()
            parameters[name] = cast(nn.Parameter, part.layout.tensors[index])
            held.setdefault(name, []).append((flat, before, weight * (slots.values[places].double() - before)))
    entries = {name: torch.cat([flat for flat, _, _ in held[name]]).unique() for name in sorted(held)}
    used = sum(flat.numel() for flat in entries.values())
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
    for start, (name, flat) in zip(combined.layout.starts, entries.items(), strict=False):
        base, change = torch.zeros_like(flat, dtype=torch.float64), torch.zeros_like(flat, dtype=torch.float64)
        for own, before, moved in held[name]:
            at = torch.searchsorted(flat, own)
            base[at] = before
            change[at] += moved
        first, end = end, end + flat.numel()
        slots.positions[first:end] = flat + start
        slots.base[first:end] = base.to(slots.base)
        slots.values[first:end] = (base + change).to(slots.values)
    combined.load(replace(slots, used=used, step=1))
    return combined


@torch.no_grad()
def combine_whole(
    parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Combines the tensors that adapters set whole; of integer tensors it takes the last adapter's."""
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
