"""Records what training changed as a frozen delta, from the slots of a ledger. `unmask.select` and the PEFT method share it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from unmask.delta.delta import SparseDelta
from unmask.delta.drawn import Draw
from unmask.delta.fingerprint import fingerprint_at
from unmask.delta.provenance import Provenance
from unmask.delta.sparse import SparseTensor
from unmask.gradients.entries import put
from unmask.ranking.ledger import Layout, Slots


def record_delta(
    layout: Layout,
    slots: Slots,
    whole: Mapping[str, Tensor],
    base: str,
    provenance: Provenance,
    order: bool = False,
) -> SparseDelta:
    """Returns the delta of an adapter or a selection.

    Args:
        layout: The eligible tensors.
        slots: The trained weights; they are rounded to each tensor's dtype.
        whole: Tensors that are stored whole, by name: those that were trained densely, and those that the base lacks,
            as they were before training.
        base: The fingerprint of the base's tensors that are not in ``whole``.
        provenance: The metadata.
        order: True to keep each entry's slot: the order of unmasking.

    Raises:
        DeltaError: A trained weight is NaN or infinite.
    """
    sparse, before = {}, {}
    for index, flat, places in layout.split(slots.positions[: slots.used]):
        tensor = layout.tensors[index]
        values = slots.values[places].to("cpu", tensor.dtype)
        kept = places.cpu() if order else None
        name, old = layout.names[index], slots.base[places].to("cpu", tensor.dtype)
        sparse[name] = entry = SparseTensor(flat.cpu(), values, tuple(tensor.shape), kept)
        if name not in whole:
            before[name] = entry.holding(old)
    kept_whole = {n: whole[n].cpu().clone() for n in sorted(whole)}
    return SparseDelta(
        sparse, kept_whole, base, provenance.to_json(), fingerprint_at(before), Draw.of(provenance.method, layout)
    )


def before_training(layout: Layout, slots: Slots, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of the named tensors that have slots in use, with the weights that they had before training."""
    originals: dict[str, Tensor] = {}
    for index, flat, places in layout.split(slots.positions[: slots.used]):
        name = layout.names[index]
        if name in tensors:
            originals[name] = tensors[name].clone()
            put(originals[name], flat, slots.base[places])
    return originals
