"""Combines several adapters into one: base + sum of w_i (adapter_i - base), at every weight that one of them sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from unmask.peft.adapter import Adapter
from unmask.peft.config import SelectiveConfig
from unmask.ranking.ledger import Layout, Slots


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


def combined_config(configs: Sequence[SelectiveConfig], names: Sequence[str], budget: int) -> SelectiveConfig:
    """Returns a configuration that covers the parameters ``names`` and whose budget is used up: nothing more is selected."""
    owners = {name.rpartition(".")[0] for name in names}
    whole = sorted({module for config in configs for module in config.modules_to_save or ()})
    return replace(
        configs[0],
        method="id3",
        budget=budget,
        total_steps=1,
        target_modules=None if "" in owners else sorted(owners),
        exclude_modules=None,
        modules_to_save=whole or None,
        allocation="global",
        record=None,
    )


def union(adapters: Sequence[Adapter]) -> tuple[dict[str, nn.Parameter], int]:
    """Returns the parameters in which adapters hold slots, by name, and the number of weights that they hold (at least 1)."""
    parameters: dict[str, nn.Parameter] = {}
    held: dict[str, list[Tensor]] = {}
    for adapter in adapters:
        slots = adapter.slots()
        for index, flat, _ in adapter.layout.split(slots.positions[: slots.used]):
            name = adapter.layout.names[index]
            parameters[name] = cast(nn.Parameter, adapter.layout.tensors[index])
            held.setdefault(name, []).append(flat)
    count = sum(torch.cat(flats).unique().numel() for flats in held.values())
    if not parameters:  # no adapter has selected anything yet
        parameters = {adapters[0].layout.names[0]: cast(nn.Parameter, adapters[0].layout.tensors[0])}
    return dict(sorted(parameters.items())), max(1, count)


def combined_slots(adapters: Sequence[Adapter], weights: Sequence[float], into: Adapter) -> Slots:
    """Returns the slots of the combination; the sums are made in float64."""
    parts = [_in_layout(adapter, into.layout) for adapter in adapters]
    positions = torch.cat([places for places, _, _ in parts]).unique()
    total = torch.zeros(positions.numel(), dtype=torch.float64, device=positions.device)
    base = torch.zeros_like(total)
    for (places, before, values), weight in zip(parts, weights, strict=True):
        at = torch.searchsorted(positions, places)
        base[at] = before
        total[at] += weight * (values - before)
    slots, used = into.slots(), positions.numel()
    slots.positions[:used], slots.base[:used] = positions, base.to(slots.base)
    slots.values[:used] = (base + total).to(slots.values)
    return replace(slots, used=used, step=1)


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


def _in_layout(adapter: Adapter, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Returns an adapter's positions in another layout, and its base weights and values there, in float64."""
    slots, starts = adapter.slots(), dict(zip(layout.names, layout.starts, strict=True))
    positions, order = [], []
    for index, flat, places in adapter.layout.split(slots.positions[: slots.used]):
        positions.append(flat + starts[adapter.layout.names[index]])
        order.append(places)
    if not positions:
        none = slots.positions[:0]
        return none, none.double(), none.double()
    at = torch.cat(order)
    return torch.cat(positions), slots.base[at].double(), slots.values[at].double()
