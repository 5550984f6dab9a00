"""Progress: what a saved adapter carries next to its values, so that training goes on from the file bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.errors import DeltaError
from unmask.ranking.ledger import Slots


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

    @classmethod
    def of(cls, slots: Slots, rounded: bool) -> Progress:
        """Returns the progress of an adapter's slots, with masters if a tensor is narrower than the values (``rounded``)."""
        order = slots.positions[: slots.used].argsort()
        masters = slots.values[: slots.used][order].cpu() if rounded else None
        small = slots.used < 2**31
        return cls(order.to("cpu", torch.int32 if small else torch.int64), masters)

    def check(self, values: Sequence[Tensor]) -> None:
        """Refuses a progress that does not belong to a delta with these values."""
        count = sum(part.numel() for part in values)
        whole = self.order.dtype in (torch.int32, torch.int64)
        if not whole or not torch.equal(self.order.long().sort().values, torch.arange(count)):
            raise DeltaError(f"the adapter's order of unmasking is not one of its {count:,} values. Take another copy.")
        if self.masters is None:
            return
        fits = self.masters.shape == (count,) and self.masters.dtype in (torch.float32, torch.float64)
        parts = self.masters.split([part.numel() for part in values]) if fits else ()
        if not fits or any(not torch.equal(m.to(v.dtype), v) for m, v in zip(parts, values, strict=True)):
            raise DeltaError("the adapter's masters do not round to its values; it was altered. Take another copy.")

    def arrange(self, slots: Slots) -> Slots:
        """Returns slots, filled in the order of the entries, in the order of unmasking."""
        order, used = self.order.to(slots.positions.device, torch.int64), slots.used
        positions, base, values = slots.positions.clone(), slots.base.clone(), slots.values.clone()
        if self.masters is not None:
            values[:used] = self.masters.to(values)
        for held in (positions, base, values):
            held[order] = held[:used].clone()
        return replace(slots, positions=positions, base=base, values=values)
