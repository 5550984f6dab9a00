"""Pause: an adapter's training waits while another adapter is in the base's tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from torch import Tensor

from unmask.peft.adapter import Adapter
from unmask.stepping import unwatch, watch


class Pause:
    """Takes an adapter that trains out of the tensors, so that its graph and gradient are good afterwards.

    Preference optimization does this with a reference adapter, between the policy's forward and its backward.

    Args:
        adapter: It has a live selection.
        base_whole: The base's version of all that it may set whole.
        tensors: The base's tensors.
    """

    def __init__(self, adapter: Adapter, base_whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        assert adapter.selection is not None
        self.adapter, self._selection = adapter, adapter.selection
        self._inside = contextlib.ExitStack()
        self._inside.enter_context(adapter.absent(base_whole, tensors))
        self._gradient, adapter.values.grad = adapter.values.grad, None
        unwatch(self._selection)  # an optimizer that steps now has nothing of it
        adapter.written = False

    def end(self) -> None:
        """The tensors, which hold the base, hold the adapter's values again; its training goes on."""
        self._inside.close()
        self.adapter.written = True
        self.adapter.values.grad = self._gradient
        watch(self._selection)
