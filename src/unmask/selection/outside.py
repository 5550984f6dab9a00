"""Brings writes into ``values`` from outside an optimizer's step to the model, and refuses those of stale copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from unmask.distributed.sharding import reshard
from unmask.errors import SelectionError
from unmask.gradients.entries import take
from unmask.gradients.taps import TapSet
from unmask.gradients.writes import copy_in, copying_optimizer, same, stale_write
from unmask.methods.method import Method
from unmask.ranking.ledger import Ledger
from unmask.selection.dense import DenseTensor
from unmask.selection.eligible import ModelFacts


class OutsideWrites:
    """Brings writes into ``values`` to the model. It refuses those that may put back a copy from before some weight was unmasked.

    Attributes:
        copied: True if an optimizer keeps a copy of ``values`` that it made when every weight had its slot.
    """

    def __init__(
        self, facts: ModelFacts, method: Method, ledger: Ledger, dense: Sequence[DenseTensor], taps: TapSet
    ) -> None:
        self._model, self._sharded = facts.model, facts.sharded
        self._method, self._ledger, self._dense, self._taps = method, ledger, dense, taps
        self._allowed = self.copied = False
        taps.writes, taps.take_in = ledger.writes, self.take_in

    @property
    def known(self) -> bool:
        """True if every weight has its slot from the start: then a copy of ``values`` cannot lack one."""
        return self._method.whole or (self._ledger.ordered and self._method.strategy == "static")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Allows writes inside the block; see `unmask.Selection.writing`."""
        if self._ledger.tentative is not None:
            raise SelectionError(
                "writing() between a backward that selects weights and its optimizer.step(): these weights have no slot yet. "
                "Write before loss.backward(), or after optimizer.step()."
            )
        self._allowed = True
        try:
            yield
            self.catch_up()
        finally:
            self._allowed = False

    def catch_up(self) -> None:
        """Brings new writes into ``values``, and into the masters of dense tensors, to the model; see `take_in`."""
        self._taps.catch_up()
        for tensor in self._dense:
            tensor.catch_up()

    @torch.no_grad()
    def take_in(self) -> None:
        """Writes new ``values`` into the tensors, or raises a `SelectionError` if they may be those of a stale copy."""
        if self.known or self._allowed or self.copied:
            if self._sharded:
                reshard(self._model)
            self._ledger.scatter()
        else:
            moved = self._ledger.layout.names[0] if self._sharded else self.differing()
            if moved is not None:
                raise stale_write(self._method.name, moved)
        self._ledger.writes.take()

    def differing(self) -> str | None:
        """Returns the name of a tensor that holds other weights than ``values``; None if there is none."""
        ledger, layout = self._ledger, self._ledger.layout
        tentative, trained = ledger.tentative, ledger.trained()
        if tentative is not None and not same(ledger.values.detach()[tentative.slots], tentative.weights):
            return layout.names[next(layout.split(tentative.positions))[0]]
        for index in ledger.occupied():
            entries = ledger.in_use(index)
            if entries is None:
                continue
            weights = take(layout.plain(index), entries.flat)
            if not same(trained[entries.slots].to(weights), weights):
                return layout.names[index]
        return None

    @torch.no_grad()
    def refuse_uncounted(self) -> None:
        """Raises a `SelectionError` for writes that torch's version counters do not show, before anything is saved."""
        if self._sharded:
            return  # to compare shards is a call of all processes together
        name = self.differing()
        if name is not None:
            raise SelectionError(
                f"selection.values and the selected weights of {name!r} hold different numbers, and no counted write explains "
                "it: either the model's tensor was written to, or the memory of values was, past torch (NumPy, a tensor that "
                "shares its storage). Write into selection.values instead, through torch. If values are right as they are: "
                "`with selection.writing(): selection.values.data = selection.values.detach().clone()`."
            )

    def refuse_stale(self) -> None:
        """Refuses writes since the last forward that may be of a stale copy; an optimizer's step begins."""
        if not self.known:
            self._taps.catch_up()

    def refuse_copies(self, optimizer: Optimizer, before: Tensor | None, used: int) -> None:
        """Raises a `SelectionError` if an optimizer, which has stepped, keeps a copy of slots whose weights are not known yet.

        The step has trained the first ``used`` slots; ``before`` is (slots,) what ``values`` held when it began, if known.
        """
        ledger = self._ledger
        name = None if self.known else copy_in(optimizer, ledger.values, before, used)
        if name is None:
            return
        if self._method.strategy == "static" and optimizer.state[ledger.values][name][:used].any():
            self.copied = True  # made when every weight had its slot
            return
        if before is not None:
            with torch.no_grad(), ledger.writes.own():
                ledger.values.copy_(before)
        raise copying_optimizer(optimizer, name, self._method.name)
