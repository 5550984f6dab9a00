"""Turns an adapter into entries of a state dict, and back. PEFT writes the entries to ``adapter_model.safetensors``.

The entries are the delta's tensors (see `unmask.delta.plain`) under keys like PEFT's. A tensor NAME of the base has
``base_model.model.NAME.unmask_indices``, ``....unmask_values``, ``....unmask_whole`` and ``....unmask_slots``. The delta's header
is JSON in a tensor of bytes, ``base_model.unmask_header``. Training goes on from ``base_model.unmask_order`` and, where tensors
are narrower than float32, from ``base_model.unmask_masters``. In a model's own state dict the adapter's name is appended to each
key.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.delta.delta import SparseDelta
from unmask.delta.file import pack, unpack
from unmask.delta.plain import INDICES, SLOTS, VALUES, WHOLE
from unmask.errors import DeltaError
from unmask.files import MOST_HEADER
from unmask.peft.config import PREFIX
from unmask.ranking.ledger import Ledger, Slots
from unmask.reading import Malformed, fields, parse_json, refusing

_BASE = "model."
_HEADER, _ORDER, _MASTERS = (f"{PREFIX}{name}" for name in ("header", "order", "masters"))
_KINDS = [kind.removeprefix("::") for kind in (INDICES, VALUES, WHOLE, SLOTS)]


@dataclass(frozen=True)
class Progress:
    """The slot of each entry of an adapter's delta, and the entries' values before they were rounded.

    The entries are sorted by tensor name, then by index. A delta does not depend on the order in which its weights were
    unmasked, but an optimizer keeps its moments by slot.

    Attributes:
        order: (n,) int32 or int64: the slot of each entry.
        masters: (n,) the values of the entries before they were rounded to the tensors' dtype; None if they were not rounded.
    """

    order: Tensor
    masters: Tensor | None = None

    def arrange(self, slots: Slots, values: Sequence[Tensor]) -> Slots:
        """Moves slots from the order of a delta's entries to that of unmasking; ``values`` are the entries' by tensor.

        Raises:
            DeltaError: The progress does not belong to a delta with these values.
        """
        count = slots.used
        whole = self.order.dtype in (torch.int32, torch.int64)
        if not whole or not torch.equal(self.order.long().sort().values, torch.arange(count)):
            raise DeltaError(f"the adapter's order of unmasking is not one of its {count:,} values. Take another copy.")
        positions, base, precise = slots.positions.clone(), slots.base.clone(), slots.values.clone()
        if self.masters is not None:
            fits = self.masters.shape == (count,) and self.masters.dtype in (torch.float32, torch.float64)
            parts = self.masters.split([part.numel() for part in values]) if fits else ()
            if not fits or any(not torch.equal(m.to(v.dtype), v) for m, v in zip(parts, values, strict=True)):
                raise DeltaError("the adapter's masters do not round to its values; it was altered. Take another copy.")
            precise[:count] = self.masters.to(precise)
        order = self.order.to(positions.device, torch.int64)
        for held in (positions, base, precise):
            held[order] = held[:count].clone()
        return replace(slots, positions=positions, base=base, values=precise)


def slots_of(delta: SparseDelta, progress: Progress | None, ledger: Ledger) -> Slots:
    """Returns a delta's entries as slots of an adapter's ledger. The base's tensors must hold the base.

    Raises:
        DeltaError: The delta does not fit the adapter's tensors and budget, or the progress does not belong to it.
    """
    layout, used, parts = ledger.layout, len(delta), sorted(delta.sparse.items())
    starts = dict(zip(layout.names, layout.starts, strict=True))
    foreign = [name for name in delta.sparse if name not in starts]
    if foreign:
        raise DeltaError(f"the adapter holds values of {foreign[0]!r}, which the config's target_modules do not cover.")
    if used > ledger.budget:
        raise DeltaError(f"the adapter holds {used:,} values; the config's budget is {ledger.budget:,}.")
    positions = torch.full_like(ledger.positions, -1)
    base, values = torch.zeros_like(ledger.base), torch.zeros_like(ledger.base)
    if parts:
        flat = torch.cat([entry.indices.cpu() + starts[name] for name, entry in parts])
        positions[:used] = flat.to(positions)
        values[:used] = torch.cat([entry.values.to(values) for _, entry in parts])
        base[:used] = layout.read(positions[:used], base.dtype)
        for index, held, places in layout.split(positions[:used]):
            whole = delta.whole.get(layout.names[index])
            if whole is not None:  # a tensor that the delta brings whole is its own base
                base[places] = whole.reshape(-1)[held.to(whole.device)].to(base)
    slots = Slots(positions, base, values, used, delta.provenance.step or 0)
    return slots if progress is None else progress.arrange(slots, [entry.values for _, entry in parts])


def put_entries(
    delta: SparseDelta, progress: Progress | None, adapter: str, prefix: str, state: MutableMapping[str, Any]
) -> None:
    """Adds an adapter's delta and progress to a state dict. ``prefix`` is the tuner's place there, ``"base_model."``."""
    tensors, header = pack(delta.sparse, delta.whole, delta.base, delta.metadata, compress=False)
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("::")
        state[f"{prefix}{_BASE}{name}.{PREFIX}{kind}.{adapter}"] = tensor
    text = json.dumps(header, sort_keys=True).encode()
    state[f"{prefix}{_HEADER}.{adapter}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    if progress is not None:
        state[f"{prefix}{_ORDER}.{adapter}"] = progress.order
        if progress.masters is not None:
            state[f"{prefix}{_MASTERS}.{adapter}"] = progress.masters


def take_entries(
    adapter: str, prefix: str, state: MutableMapping[str, Any]
) -> tuple[SparseDelta, Progress | None] | None:
    """Takes an adapter's delta and progress out of a state dict. Returns None if it has no entry of this adapter."""
    own = [key for key in state if is_entry(key, adapter)]
    tensors = {key.removeprefix(prefix).removesuffix(f".{adapter}"): state.pop(key).cpu() for key in own}
    if not tensors:
        return None
    header, order, masters = (tensors.pop(key, None) for key in (_HEADER, _ORDER, _MASTERS))
    if header is None:
        raise DeltaError(f"adapter {adapter!r} lacks its header; the file is incomplete. Take another copy.")
    with refusing(DeltaError, "the adapter's header", "Take another copy."):
        if header.dtype != torch.uint8 or header.ndim != 1:
            raise Malformed(f"it is {header.dtype} of shape {tuple(header.shape)} and must be a vector of bytes")
        read = dict(fields({})(parse_json(header.numpy().tobytes(), MOST_HEADER), "the header"))
    named = {}
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix(_BASE).rpartition(f".{PREFIX}")
        if kind not in _KINDS:
            raise DeltaError(f"the adapter holds an entry {key!r} that belongs to nothing. Take another copy.")
        named[f"{name}::{kind}"] = tensor
    delta = SparseDelta(*unpack(named, read, f"adapter {adapter!r}"))
    return delta, None if order is None else Progress(order, masters)


def is_entry(key: str, adapter: str | None) -> bool:
    """Returns True if a key is an entry of the adapter of this name; None stands for a file, whose keys have no name."""
    end = "" if adapter is None else f".{adapter}"
    return key.endswith(tuple(f".{PREFIX}{kind}{end}" for kind in (*_KINDS, "header", "order", "masters")))
