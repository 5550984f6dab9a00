"""What one optimizer step does to the slots: planned before its first forward, tentative until the optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What one optimizer step does: fixed before its first forward."""

    step: int
    used: int  # slots that hold trained weights
    active: int  # slots whose gradient is wanted: `used`, and those that a known order unmasks now; see `picked` too
    newcomers: int  # u_t, to be selected by this step's gradient; for repeat-S the whole of B
    repeat: bool
    picked: Tensor | None = None  # where repeat-S keeps what leaves: the slots that it picked last; they alone train

    @property
    def selecting(self) -> bool:
        """Whether dense gradients are needed to select."""
        return self.newcomers > 0

    @property
    def exchanging(self) -> bool:
        """Whether a weight may leave its slot to another."""
        return self.repeat and self.picked is None

    @property
    def due(self) -> int:
        """Slots in use once the step is made, if it finds all newcomers; of repeat-S that keeps what leaves, those before it."""
        if self.picked is not None:
            return self.used
        return self.newcomers if self.repeat and self.selecting else self.active + self.newcomers

    def open(self, device: torch.device) -> Tensor:
        """Returns the slots, ascending int64, that may change hands: the fresh ones; for repeat-S all of them.

        Example:
            >>> Plan(step=4, used=3, active=3, newcomers=2, repeat=False).open(torch.device("cpu")).tolist()
            [3, 4]
        """
        return torch.arange(0 if self.repeat else self.used, self.due, device=device)


@dataclass(frozen=True)
class Tentative:
    """A selection that waits for the optimizer's step."""

    slots: Tensor  # (u,) int64
    positions: Tensor  # (u,) int64
    weights: Tensor  # (u,) their current weights
    displaced: Tensor  # (u,) what `values` held at these slots
    fresh: int  # how many of the slots held nothing before
    missing: int  # how many more were to be selected, but no other weight has a score that tells anything
    picked: Tensor | None = None  # as of `Plan.picked`, once the step is made: slots, old and new
