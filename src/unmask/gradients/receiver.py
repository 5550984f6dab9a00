"""What consumes streamed gradients, and what it may say of them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from unmask.errors import SelectionError
from unmask.gradients.factors import Factors
from unmask.slots import Entries


class Receiver(Protocol):
    """What consumes the gradients."""

    def wanted(self, index: int) -> bool:
        """Whether this tensor's gradient is wanted in the coming backward."""

    def entries(self, index: int) -> Entries | None:
        """The entries whose gradient suffices; None for the whole tensor's."""

    def factored(self, index: int) -> bool:
        """Whether the whole tensor's gradient may come as `Factors`."""

    def begin(self) -> None:
        """A backward starts."""

    def receive(self, index: int, gradient: Tensor | Factors, entries: Entries | None) -> None:
        """One tensor's gradient: whole, or (m,) at the entries that its forward was asked for."""

    def end(self) -> None:
        """The backward is complete."""

    def abort(self) -> None:
        """The backward died; what it brought is void."""


def in_pieces() -> SelectionError:
    """The error of a receiver that needs whole gradients."""
    return SelectionError(
        "a tensor received its gradient in pieces within one backward, and cannot be ranked by it. If a module is shared "
        "between segments of reentrant checkpointing, call model.train() or checkpoint with use_reentrant=False; if one loss "
        "contains forwards from before and after another backward, run its backward by itself."
    )


def stale() -> SelectionError:
    """The error of a receiver that needs whole gradients and gets some entries."""
    return SelectionError(
        "this backward goes through a forward that ran before the last optimizer step, and this step selects by whole "
        "gradients, which that forward does not give. Run the forward again, or select(..., gradients='dense')."
    )
