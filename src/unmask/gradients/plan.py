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
    newcomers: int  # u_t + `drops`, to be selected by this step's gradient; for repeat-S the whole of B
    repeat: bool
    drops: int = 0  # d_t: how many of the slots in use compete for their place with what is not unmasked
    picked: Tensor | None = None  # where repeat-S keeps what leaves: the slots that it picked last; they alone train

    @property
    def selecting(self) -> bool:
        """Whether dense gradients are needed to select."""
        return self.newcomers > 0

    @property
    def exchanging(self) -> bool:
        """Whether a weight may leave its slot to another."""
        return (self.repeat and self.picked is None) or self.drops > 0

    @property
    def due(self) -> int:
        """Slots in use once the step is made, if it finds all newcomers; of repeat-S that keeps what leaves, those before it."""
        if self.picked is not None:
            return self.used
        return self.newcomers if self.repeat and self.selecting else self.active + self.newcomers - self.drops

    def open(self, values: Tensor, base: Tensor, positions: Tensor) -> Tensor:
        """Slots, ascending, that may change hands: the fresh ones, and the ``drops`` whose weights have changed least.

        Args:
            values: (B,) the current values.
            base: (B,) the values that they started from.
            positions: (B,) what the slots hold; of equal changes the first position's is the least.

        Example:
            >>> plan = Plan(step=4, used=3, active=3, newcomers=2, repeat=False, drops=1)
            >>> values, positions = torch.tensor([0.5, 0.1, -0.4, 0.0]), torch.tensor([7, 2, 5, -1])
            >>> plan.open(values, torch.zeros(4), positions).tolist()
            [1, 3]
        """
        fresh = torch.arange(0 if self.repeat else self.used, self.due, device=values.device)
        if not self.drops:
            return fresh
        by_position = positions[: self.used].argsort()
        change = (values - base)[by_position].abs()
        least = by_position[change.argsort(stable=True)[: self.drops]]
        return torch.cat([least.sort().values, fresh])


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
