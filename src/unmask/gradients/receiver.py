"""Says what a consumer of the gradients that taps see must offer, and makes the errors of one that cannot go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from unmask.errors import SelectionError
from unmask.gradients.entries import Entries
from unmask.gradients.factors import Factors


class Receiver(Protocol):
    """The consumer of the gradients that a `TapSet` sees; by default it takes whole gradients.

    For each outermost backward come ``begin`` once, then ``receive`` for each tensor with the sum over all its uses, or
    ``collect`` if `at_entries` gave entries to the forward, then ``end`` once; if it fails, ``abort``. A receiver adds up what
    ``collect`` brings. A whole gradient may come in pieces in two cases: a graph holds forwards from before and after another
    backward, or segments of reentrant checkpointing share a module of a model that is not in training mode. A receiver that
    cannot add up such pieces raises `in_pieces`.
    """

    def wanted(self, index: int) -> bool:
        """Returns True if the coming backward needs this tensor's gradient."""

    def at_entries(self) -> Mapping[int, Entries] | None:
        """Returns the entries, by tensor, whose gradients suffice until the next `TapSet.prepare`.

        While they stay what they were, it returns the same object. It returns None if whole gradients are needed.
        """
        return None

    def factored(self, index: int) -> bool:
        """Returns True if the whole tensor's gradient may come as `Factors`."""
        return False

    def begin(self) -> None:
        """Learns that a backward starts."""
        return

    def receive(self, index: int, gradient: Tensor | Factors) -> None:
        """Takes one tensor's whole gradient."""

    def collect(self, slots: Tensor, gradient: Tensor) -> None:
        """Takes the gradient (n,) of slots, (n,) int64, whose entries `at_entries` gave to the forward."""
        return

    def end(self) -> None:
        """Learns that the backward is complete."""
        return

    def abort(self) -> None:
        """Learns that the backward failed, so that what it brought is void."""
        return


def in_pieces() -> SelectionError:
    """Makes the error of a receiver that needs whole gradients and gets one in pieces."""
    return SelectionError(
        "a tensor received its gradient in pieces within one backward, and cannot be ranked by it. If segments of reentrant "
        "checkpointing share a module, call model.train() or checkpoint with use_reentrant=False. If one loss contains "
        "forwards from before and after another backward, run its backward by itself."
    )


def stale() -> SelectionError:
    """Makes the error of a receiver that needs whole gradients and gets some entries."""
    return SelectionError(
        "this backward goes through a forward that ran before the last optimizer step. The current step selects by whole "
        "gradients, which that forward does not give. Run the forward again, or use select(..., gradients='dense')."
    )
