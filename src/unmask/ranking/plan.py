"""The plan of what one optimizer step does to the slots of a selection, and the choice of weights that waits for this step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """The plan of what one optimizer step does to the slots. It is fixed before the step's first forward.

    Attributes:
        step: The number of the step, from 0.
        used: How many slots hold trained weights.
        active: How many slots get a gradient: those in use, and those that a known order unmasks now.
        newcomers: u_t, how many weights this step's gradient selects. For repeat-S it is the whole budget B.
        repeat: True for repeat-S, which selects all of its weights again.
        picked: (n,) int64 slots that repeat-S picked last, where it keeps the weights that leave; they alone train. None
            for every other method.
    """

    step: int
    used: int
    active: int
    newcomers: int
    repeat: bool
    picked: Tensor | None = None

    @property
    def selecting(self) -> bool:
        """True if this step selects weights by their gradient."""
        return self.newcomers > 0

    @property
    def exchanging(self) -> bool:
        """True if a weight may leave its slot to another weight."""
        return self.repeat and self.picked is None

    @property
    def due(self) -> int:
        """The number of slots in use after the step, if it finds all newcomers; with ``picked``, that before the step."""
        if self.picked is not None:
            return self.used
        return self.newcomers if self.repeat and self.selecting else self.active + self.newcomers

    def open(self, device: torch.device) -> Tensor:
        """Returns the slots that may get another weight: ascending int64. For repeat-S these are all slots.

        Example:
            >>> Plan(step=4, used=3, active=3, newcomers=2, repeat=False).open(torch.device("cpu")).tolist()
            [3, 4]
        """
        return torch.arange(0 if self.repeat else self.used, self.due, device=device)


@dataclass(frozen=True)
class Groups:
    """Positions in ascending order, and where those of each tensor begin.

    Attributes:
        positions: (n,) int64, ascending.
        places: (n,) int64, where each stands among the positions as they were given.
        edges: For each tensor the place, in the ascending order, of its first position; and n at the end.
    """

    positions: Tensor
    places: Tensor
    edges: Sequence[int]

    def merged(self, new: Groups) -> Groups:
        """Returns both groups as one; they share no position. The host does not wait for a device."""
        n, m, device = self.positions.numel(), new.positions.numel(), self.positions.device
        if not n:
            return new
        # Each entry moves behind those of the other groups that come before it.
        mine = torch.searchsorted(new.positions, self.positions) + torch.arange(n, device=device)
        others = torch.searchsorted(self.positions, new.positions) + torch.arange(m, device=device)
        positions, places = (old.new_empty(n + m) for old in (self.positions, self.places))
        positions[mine], positions[others] = self.positions, new.positions
        places[mine], places[others] = self.places, new.places
        return Groups(positions, places, [a + b for a, b in zip(self.edges, new.edges, strict=True)])


@dataclass(frozen=True)
class Tentative:
    """A choice of weights that a backward has made and that the optimizer's step makes final.

    Attributes:
        slots: (u,) int64 slots that the chosen weights get.
        positions: (u,) int64 positions of the chosen weights.
        weights: (u,) the current values of the chosen weights.
        displaced: (u,) the numbers that ``values`` held in these slots before.
        fresh: How many of the slots held no weight before.
        missing: How many weights too few were chosen, because no other weight has a score that tells it from the rest.
        groups: The positions, sorted and grouped by tensor.
        picked: (n,) int64 slots that train after the step; see `Plan.picked`.
    """

    slots: Tensor
    positions: Tensor
    weights: Tensor
    displaced: Tensor
    fresh: int
    missing: int
    groups: Groups
    picked: Tensor | None = None

    @property
    def replaces(self) -> bool:
        """True if one of the slots held another weight before."""
        return self.fresh < self.slots.numel()
