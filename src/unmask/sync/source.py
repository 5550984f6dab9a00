"""Reads off a live selection what a publisher sends: the support, and the values as the model's forward sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.delta.base import base_tensors
from unmask.delta.fingerprint import same_bits
from unmask.delta.record import before_training
from unmask.distributed.sharding import is_sharded, reshard
from unmask.errors import SyncError
from unmask.gradients.wrappers import named_parameters, persistent_buffers
from unmask.selection.selection import Selection
from unmask.sync.support import DTYPES, Places, Support, Table, bits_of, table_of


class Source:
    """Reads a selection. It remembers where the selected weights lie, so that reading the same ones again takes O(B).

    Args:
        selection: The selection.

    Attributes:
        support: The support at the last `update`.

    Raises:
        SyncError: The model is quantised, or a tensor that no base has is sharded.
    """

    def __init__(self, selection: Selection) -> None:
        facts = selection.facts
        if facts.quantised:
            raise SyncError(
                f"{min(facts.quantised)!r} is quantised, and its trained weights are kept next to it in float32, which no "
                "receiver holds. Train a model that is not quantised, or send selection.delta() (docs/quantised.md)."
            )
        reshard(selection.model)
        spread = {name for name, p in named_parameters(selection.model).items() if is_sharded(p)}
        if spread and (whole := spread & facts.new()):
            raise SyncError(
                f"{min(whole)!r} is in no base, so it is sent whole, and it is sharded, so that no process has all of it. "
                "Keep it out of the sharding: fully_shard(model, ignored_params={...})."
            )
        self._selection = selection
        self.support = Support(())
        self._positions: Tensor | None = None  # of the slots in use at the last update
        self._slots = torch.empty(0, dtype=torch.int64)  # the slot of each place of the support
        self._changed: set[str] = set()  # the buffers that training has changed

    def update(self) -> None:
        """Finds the current support.

        Raises:
            SyncError: The selection was released, or a tensor to be sent has a dtype that no message holds.
            SelectionError: The model is no longer what was selected from.
        """
        selection, ledger = self._selection, self._selection.ledger
        if selection.released:
            raise SyncError("the selection was released, so nothing is trained any more; publish before release().")
        selection.check_model()
        layout, positions, table = ledger.layout, ledger.positions[: ledger.used], self.support.table
        with torch._C.DisableTorchFunctionSubclass():
            dtypes = {name: tensor.dtype for name, tensor in zip(layout.names, layout.tensors, strict=True)}
        if not table or any(dtypes.get(spec.name, DTYPES[spec.dtype]) != DTYPES[spec.dtype] for spec in table):
            table, self._positions = table_of(selection.model), None
        originals = selection.facts.buffers
        buffers = persistent_buffers(selection.model) if originals else {}
        self._changed |= {name for name, before in originals.items() if not same_bits(before, buffers[name])}
        whole = self._numbers(table, {d.name for d in selection.dense} | self._changed)
        places = self.support.places
        if self._positions is None or not torch.equal(positions, self._positions):
            split = {layout.names[index]: (flat, slots) for index, flat, slots in layout.split(positions)}
            numbers = self._numbers(table, set(split))
            found = [split[table[number].name] for number in numbers]
            sizes = [(number, flat.numel()) for number, (flat, _) in zip(numbers, found, strict=True)]
            indices = torch.cat([positions[:0], *(flat for flat, _ in found)]).cpu()  # the host waits once
            self._slots = torch.cat([positions[:0], *(slots for _, slots in found)])
            parts = zip(
                indices.split([size for _, size in sizes]),
                _by_tensor(ledger.base[self._slots], sizes, table),
                strict=True,
            )
            places = {number: Places(flat.numpy(), bits_of(base)) for flat, (number, base) in parts}
            self._positions = positions.clone()
        self.support = Support(table, places, whole)

    def placed(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the values at the places of the support: the tensor's number, and a vector in its dtype, on the CPU."""
        sizes = [(number, each.indices.size) for number, each in self.support.places.items()]
        return _by_tensor(
            self._selection.ledger.trained()[self._slots], sizes, self.support.table, self._refuse_diverged
        )

    def whole(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the tensors that are sent whole, with their numbers, on the CPU."""
        trained = {d.name: d.parameter for d in self._selection.dense}
        buffers = persistent_buffers(self._selection.model) if self._changed else {}
        for number in self.support.whole:
            name = self.support.table[number].name
            tensor = (trained[name] if name in trained else buffers[name]).detach().cpu()
            if name in trained:
                self._refuse_diverged([number], tensor)
            yield number, tensor

    def once(self) -> dict[int, NDArray]:
        """Returns the other tensors that the base lacks, as they were before training, as bits by number."""
        selection, ledger = self._selection, self._selection.ledger
        names = selection.facts.new()
        if not names:
            return {}
        tensors = {name: tensor for name, tensor in base_tensors(selection.model).items() if name in names}
        tensors |= before_training(ledger.layout, ledger.snapshot(), tensors)
        table, numbers = self.support.table, self._numbers(self.support.table, set(tensors))
        return {n: bits_of(tensors[table[n].name]) for n in numbers if n not in self.support.whole}

    def _numbers(self, table: Table, names: set[str]) -> tuple[int, ...]:
        """Returns the numbers of tensors in the table, ascending."""
        numbers = tuple(number for number, spec in enumerate(table) if spec.name in names)
        if len(numbers) < len(names):
            lacking = min(names - {table[number].name for number in numbers})
            raise SyncError(f"{lacking!r} has a dtype that no message holds; there are {', '.join(DTYPES)}.")
        return numbers

    def _refuse_diverged(self, numbers: Sequence[int], values: Tensor) -> None:
        """Refuses trained weights of some tensors that are NaN or infinite."""
        if values.is_floating_point() and not torch.isfinite(values).all():
            more = f" (or of {len(numbers) - 1} more tensors)" if numbers[1:] else ""
            raise SyncError(
                f"a trained weight of {self.support.table[numbers[0]].name!r}{more} is NaN or infinite: training has diverged. "
                "Nothing was sent."
            )


def _by_tensor(
    values: Tensor,
    sizes: Sequence[tuple[int, int]],
    table: Table,
    check: Callable[[Sequence[int], Tensor], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Cuts a vector into tensors, each cast to its dtype. The host waits once for each dtype.

    Args:
        values: The vector.
        sizes: The number of each tensor, and of its entries in the vector, in order.
        table: The tensors.
        check: Called with the numbers of the tensors of one dtype, and their entries.

    Yields:
        The number, and the entries on the CPU.
    """
    for dtype, run in groupby(sizes, key=lambda each: table[each[0]].dtype):
        numbers, counts = zip(*run, strict=True)
        first, values = values[: sum(counts)], values[sum(counts) :]
        cast = first.to(DTYPES[dtype]).cpu()
        if check is not None:
            check(numbers, cast)
        yield from zip(numbers, cast.split(list(counts)), strict=True)
