"""What a saved adapter carries beside its values, so that training goes on from the file bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmask.errors import DeltaError

if TYPE_CHECKING:
    from unmask.peft.adapter import Slots


@dataclass(frozen=True)
class Progress:
    """An adapter's slots by the entries of its delta (sorted by tensor name, then index).

    A delta is the same whatever order its weights were unmasked in; an optimizer's moments are by slot.

    Attributes:
        order: (n,) int32 or int64: the slot of each entry.
        masters: (n,) the values of the entries before they were rounded to the tensors' dtype; None if they were not.
    """

    order: Tensor
    masters: Tensor | None = None

    @classmethod
    def of(cls, slots: Slots, rounded: bool) -> Progress:
        """That of an adapter's slots; ``rounded`` if a tensor holds less than its masters."""
        order = slots.positions[: slots.used].argsort()
        masters = slots.values[: slots.used][order].cpu() if rounded else None
        small = slots.used < 2**31
        return cls(order.to("cpu", torch.int32 if small else torch.int64), masters)

    def check(self, values: Sequence[Tensor]) -> None:
        """Refuses what does not belong to a delta with these values.

        Raises:
            DeltaError: An order that is none, or masters of other values.
        """
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

    def arrange(self, slots: Slots) -> None:
        """Puts slots that were filled in the order of the entries into the order of unmasking."""
        order, used = self.order.to(slots.positions.device, torch.int64), slots.used
        if self.masters is not None:
            slots.values[:used] = self.masters.to(slots.values)
        for held in (slots.positions, slots.base, slots.values):
            held[order] = held[:used].clone()
