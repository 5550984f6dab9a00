"""The ledger of a selection: which scalar weight each slot of ``values`` holds, and what the weight was before training.

The *position* of a scalar weight is its number among all scalar weights of the eligible tensors, concatenated in name order.
A *slot* is an entry of the trainable vector ``values``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unmask.gradients.entries import Entries, put, take
from unmask.gradients.writes import Writes
from unmask.ranking.plan import Groups, Tentative


class Layout:
    """The eligible tensors in name order, and the positions of their weights.

    Attributes:
        names: The tensors' names, sorted.
        tensors: The tensors themselves.
        bounds: (tensors + 1,) int64: the first position of each tensor, and the total.
        starts: The first position of each tensor, as a list.
        total: The number of scalar weights.
        free: The number of scalar weights that may be selected: all but those that `leave_out` names.
        versions: Each tensor's version counter after our own last write (see `unmask.selection.identity`).
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self.names = list(names)
        self.tensors = list(tensors)
        sizes = torch.tensor([0] + [t.numel() for t in self.tensors], dtype=torch.int64)
        self.bounds = sizes.cumsum(0)
        self.starts: list[int] = self.bounds[:-1].tolist()
        self.total = self.free = int(self.bounds[-1])
        self._avoided: dict[int, Tensor] = {}
        self.versions = [-1] * len(self.tensors)

    def leave_out(self, avoided: Mapping[str, Tensor]) -> None:
        """Keeps weights from being selected: by tensor name, (m,) int64 flat indices, ascending. Other names are ignored."""
        indices = {name: index for index, name in enumerate(self.names)}
        self._avoided = {
            indices[name]: flat.to(self.tensors[indices[name]].device)
            for name, flat in avoided.items()
            if name in indices and flat.numel()
        }
        self.free = self.total - sum(flat.numel() for flat in self._avoided.values())

    def avoided(self, index: int) -> Tensor | None:
        """Returns the flat indices of a tensor's weights that may not be selected, (m,) int64, ascending; None if all may."""
        flat = self._avoided.get(index)
        return None if flat is None else flat.to(self.tensors[index].device)

    def numbered(self, ranks: Tensor) -> Tensor:
        """Returns the positions of the weights with these numbers among those that may be selected, (n,) int64 on the CPU.

        Example:
            >>> layout = Layout(["a"], [torch.zeros(6)])
            >>> layout.leave_out({"a": torch.tensor([0, 3])})
            >>> layout.numbered(torch.tensor([0, 1, 2, 3])).tolist()
            [1, 2, 4, 5]
        """
        if not self._avoided:
            return ranks
        parts = [self.starts[index] + self._avoided[index].cpu() for index in sorted(self._avoided)]
        avoided = torch.cat(parts)
        # Before the i-th avoided position lie ``avoided[i] - i`` others.
        before = avoided - torch.arange(avoided.numel())
        return ranks + torch.searchsorted(before, ranks, right=True)

    def plain(self, index: int) -> Tensor:
        """Returns a tensor without gradient tracking; it shares storage and version counter with the parameter."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.tensors[index].detach()

    def groups(self, positions: Tensor) -> Groups:
        """Groups positions by tensor. To learn how many fall into each, the host waits for the device once."""
        places = positions.argsort()
        ordered = positions[places]
        return Groups(ordered, places, torch.searchsorted(ordered, self.bounds.to(ordered.device)).tolist())

    def split(self, positions: Tensor | Groups) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields positions by tensor: (its index, flat indices ascending, their places in ``positions``)."""
        groups = positions if isinstance(positions, Groups) else self.groups(positions)
        for index, (low, high) in enumerate(pairwise(groups.edges)):
            if low < high:
                yield index, groups.positions[low:high] - self.starts[index], groups.places[low:high]

    def at(self, index: int, flat: Tensor, slots: Tensor) -> Entries:
        """Returns a tensor's entries at ascending flat indices."""
        tensor = self.tensors[index]
        rows = tensor.shape[0] if tensor.ndim > 1 else 1
        return Entries((rows, tensor.numel() // rows if rows else 0), flat.to(tensor.device), slots)

    def entries(self, positions: Tensor) -> Iterator[tuple[int, Entries]]:
        """Groups positions by tensor; the slot of an entry is its place in ``positions``."""
        for index, flat, places in self.split(positions):
            yield index, self.at(index, flat, places)

    def read(self, positions: Tensor | Groups, dtype: torch.dtype) -> Tensor:
        """Returns the current weights at positions, in ``dtype``, in the order in which the positions were given."""
        groups = positions if isinstance(positions, Groups) else self.groups(positions)
        values = torch.empty(groups.places.shape, dtype=dtype, device=groups.places.device)
        for index, flat, places in self.split(groups):
            values[places] = take(self.plain(index), flat).to(values.device, dtype)
        return values

    def write(self, positions: Tensor, values: Tensor) -> None:
        """Sets the weights at positions; they are cast to each tensor's dtype."""
        for index, flat, places in self.split(positions):
            self.put(index, flat, values[places])

    def put(self, index: int, flat: Tensor, values: Tensor) -> None:
        """Sets one tensor's weights at flat indices; they are cast to its dtype."""
        tensor = self.plain(index)
        ours = not tensor.is_inference() and tensor._version == self.versions[index]
        put(tensor, flat, values)
        if ours:
            self.versions[index] = tensor._version

    def holds(self, parameter: Tensor) -> bool:
        """Returns True if ``parameter`` is the DTensor that FSDP puts in the place of one of the tensors.

        A plain layout has none; `unmask.distributed.sharding.ShardedLayout` overrides this.
        """
        return False


@dataclass(frozen=True)
class Slots:
    """A frozen copy of a ledger: what state, delta, analysis and PEFT read.

    Attributes:
        positions: (slots,) int64 positions of the weights; -1 where a slot is empty.
        base: (slots,) the weights before training.
        values: (slots,) the trained weights; 0 where a slot is not in use.
        used: How many slots are in use; they are the first ones.
        step: How many optimizer steps were taken.
        picked: (n,) int64 slots that the last step of repeat-S picked, where it keeps the weights that leave; then only the
            slots in use are copied. None for every other method.
    """

    positions: Tensor
    base: Tensor
    values: Tensor
    used: int = 0
    step: int = 0
    picked: Tensor | None = None

    def entries(self) -> dict[str, Any]:
        """Returns the fields by name, in the order of a selection's state; ``picked`` only where there is one."""
        names = ["step", "used", "values", "base", "positions", *(() if self.picked is None else ("picked",))]
        return {name: getattr(self, name) for name in names}


class Ledger:
    """The table of which weight each slot of ``values`` holds, and what it was before training. It alone writes into ``values``.

    A backward *proposes* weights for slots; `withdraw` takes the proposal back, and the optimizer's step makes it final
    by `commit`. The table takes O(B) memory for a model of any size.

    Attributes:
        layout: The eligible tensors.
        values: (slots,) the parameter that an optimizer trains; its device and dtype are the ledger's. It has a slot for every
            weight if ``kept`` was given, for repeat-S that keeps the weights that leave (`unmask.Method.leaving`).
        budget: B, of which an allocation gives each tensor, row or column its share.
        positions: (slots,) int64 positions of the weights; -1 where a slot is empty.
        base: (slots,) the weights before training.
        held: The number of slots up to the last one that has a weight; more than ``used`` where the order is known.
        used: How many slots are in use.
        step: How many optimizer steps were taken.
        picked: See `Slots.picked`.
        ordered: True if the order of unmasking is known before training; then every slot has its weight from the start.
        tentative: The proposal that waits for the optimizer's step.
        writes: Tells the writes into ``values`` that others have made.
    """

    def __init__(self, layout: Layout, values: nn.Parameter, budget: int, kept: bool = False) -> None:
        self.layout, self.values, self.budget = layout, values, budget
        self.positions = torch.full(values.shape, -1, dtype=torch.int64, device=values.device)
        self.base = torch.zeros(values.shape, dtype=values.dtype, device=values.device)
        self.held = self.used = self.step = 0
        self.picked = torch.empty(0, dtype=torch.int64, device=values.device) if kept else None
        self.ordered = False
        self.tentative: Tentative | None = None
        self.writes = Writes(values)
        self._occupied = layout.groups(self.positions[:0])  # of the slots that have a weight
        self._members: dict[int, Entries] = {}  # as far as they were asked for

    # What the slots hold.

    @property
    def arrangement(self) -> object:
        """An object that is replaced by another one when slots get other weights, or tensors move to another device."""
        return self._occupied

    def members(self, index: int) -> Entries | None:
        """Returns one tensor's entries that have a slot; None if it has none."""
        known = self._members.get(index)
        if known is not None:
            return known
        low, high = self._occupied.edges[index : index + 2]
        if low < high:
            flat = self._occupied.positions[low:high] - self.layout.starts[index]
            self._members[index] = self.layout.at(index, flat, self._occupied.places[low:high])
        return self._members.get(index)

    def in_use(self, index: int) -> Entries | None:
        """Returns one tensor's entries whose slot is in use; None if no entry has a slot."""
        members = self.members(index)
        return members if members is None or self.used >= self.held else members.below(self.used)

    def entries(self, slots: Tensor) -> dict[int, Entries]:
        """Returns the entries of slots that all have a weight, by tensor index."""
        positions = self.positions[slots]
        return {i: self.layout.at(i, flat, slots[places]) for i, flat, places in self.layout.split(positions)}

    def find(self, positions: Tensor) -> Tensor:
        """Returns the slot of each position: (n,) int64, -1 where it has none."""
        own, slots = self._occupied.positions, self._occupied.places
        if not own.numel():
            return torch.full_like(positions, -1)
        at = torch.searchsorted(own, positions).clamp_(max=own.numel() - 1)
        return torch.where(own[at] == positions, slots[at], -1)

    def occupied(self) -> list[int]:
        """Returns the tensors that have at least one slot, ascending."""
        return [index for index, (low, high) in enumerate(pairwise(self._occupied.edges)) if low < high]

    def trained(self) -> Tensor:
        """Returns ``values`` without the weights that a proposal has put into slots of others: (slots,), detached."""
        tentative = self.tentative
        if tentative is None or not tentative.replaces:
            return self.values.detach()
        values = self.values.detach().clone()
        values[tentative.slots] = tentative.displaced
        return values

    # From one step to the next.

    def reserve(self, positions: Tensor) -> None:
        """Gives the slots, in order, to weights whose order of unmasking is known before training."""
        positions = positions.to(self.values.device)
        self._fill(positions, self.layout.read(positions, self.values.dtype))
        self.ordered = True

    def unmask(self, due: int) -> None:
        """Puts the reserved weights of the slots from ``used`` to ``due`` into ``values``; `commit` brings them into use."""
        with torch.no_grad(), self.writes.own():
            self.values[self.used : due] = self.base[self.used : due]

    def propose(self, positions: Tensor, slots: Tensor, fresh: int, missing: int, picked: Tensor | None = None) -> None:
        """Puts the current weights at ``positions`` into ``slots`` of ``values``, until `withdraw` or `commit`.

        The arguments are those of `Tentative`.
        """
        with torch.no_grad(), self.writes.own():
            groups = self.layout.groups(positions)  # once, for the host waits
            weights = self.layout.read(groups, self.values.dtype)
            displaced = self.values[slots].clone()
            self.tentative = Tentative(slots, positions, weights, displaced, fresh, missing, groups, picked)
            self.values[slots] = weights

    def withdraw(self) -> None:
        """Takes the proposal back, if there is one: no budget is consumed."""
        if self.tentative is not None:
            with torch.no_grad(), self.writes.own():
                self.values[self.tentative.slots] = self.tentative.displaced
        self.tentative = None

    @torch.no_grad()
    def commit(self, due: int) -> None:
        """Makes the proposal final, and writes ``values`` into the tensors; a weight that left its slot gets its base value.

        The first ``due`` slots are in use from now on.
        """
        tentative, self.tentative = self.tentative, None
        if tentative is not None:
            if tentative.replaces:
                leaving = self.positions[tentative.slots]
                had = leaving >= 0
                self.layout.write(leaving[had], self.base[tentative.slots][had])
                self.assign(tentative.slots, tentative.positions, tentative.weights)
            else:  # the slots are the next empty ones
                end = self.used + tentative.fresh
                self._enter(tentative.slots, tentative.positions, tentative.weights, tentative.groups, end)
            self.picked = tentative.picked
        self.used = due
        self.scatter()
        self.writes.take()
        self.step += 1

    def assign(self, slots: Tensor, positions: Tensor, base: Tensor) -> None:
        """Gives slots to positions, and takes them from the positions that had them."""
        if not slots.numel():
            return
        if (self.positions[slots] < 0).all():
            self._enter(slots, positions, base, self.layout.groups(positions), int(slots.max().item()) + 1)
            return
        self.positions[slots] = positions
        self.base[slots] = base
        self.rebuild()

    def _enter(self, slots: Tensor, positions: Tensor, base: Tensor, groups: Groups, end: int) -> None:
        """Gives empty slots, all of them before ``end``, to positions. The host does not wait for the device."""
        self.positions[slots] = positions
        self.base[slots] = base
        self.held = max(self.held, end)
        self._occupied = self._occupied.merged(replace(groups, places=slots[groups.places]))
        self._members = {}

    def scatter(self) -> None:
        """Writes the values of the slots in use into the tensors; a proposal is left out."""
        trained, occupied = self.trained(), self.occupied()
        entries = [members for index in occupied if (members := self.members(index)) is not None]
        if self.used >= self.held and self.held:  # one gather for all tensors
            values = trained[self._occupied.places].split([members.flat.numel() for members in entries])
        else:
            entries = [members.below(self.used) for members in entries]
            values = tuple(trained[inside.slots] for inside in entries)
        for index, inside, new in zip(occupied, entries, values, strict=True):
            self.layout.put(index, inside.flat, new)

    @torch.no_grad()
    def zero_rest(self) -> None:
        """Sets every weight of the layout that has no slot to zero."""
        for index in range(len(self.layout.tensors)):
            tensor, entries = self.layout.plain(index), self.members(index)
            kept = None if entries is None else take(tensor, entries.flat)
            tensor.zero_()
            if entries is not None and kept is not None:
                put(tensor, entries.flat, kept)

    # Copies, and back.

    def snapshot(self) -> Slots:
        """Returns copies of what the slots hold after the last step; a proposal is left out."""
        end = None if self.picked is None else self.used  # of slots for all weights, those in use
        values = self.trained()[:end].clone()
        values[self.used :] = 0  # a proposal's weights in empty slots among them
        picked = None if self.picked is None else self.picked.clone()
        return Slots(self.positions[:end].clone(), self.base[:end].clone(), values, self.used, self.step, picked)

    @torch.no_grad()
    def load(self, slots: Slots) -> None:
        """Takes over slots, on the device of ``values``; the tensors are left as they are. A proposal is dropped."""
        self.positions, self.base = (t.to(self.values.device) for t in (self.positions, self.base))
        self._fill(slots.positions, slots.base)
        self.values.zero_()
        self.values[: slots.values.numel()] = slots.values
        self.used, self.step, self.tentative = slots.used, slots.step, None
        self.picked = None if slots.picked is None else slots.picked.clone()

    @torch.no_grad()
    def restore(self, slots: Slots) -> None:
        """Takes over slots: the tensors get the base values of the old ones, and then the trained values of the new ones."""
        self.layout.write(self.positions[: self.used], self.base[: self.used])
        self.load(slots)
        self.scatter()
        self.writes.take()

    def copy_of(self, slots: Slots) -> Ledger:
        """Returns a ledger at rest for the same ``values`` and tensors, with the positions and base values of ``slots``."""
        ledger = Ledger(self.layout, self.values, self.budget)
        ledger._fill(slots.positions, slots.base)
        ledger.used, ledger.step = slots.used, slots.step
        return ledger

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the writes of a copy's own ``values`` for seen."""
        vars(self).update(state)
        self.writes = Writes(self.values)

    def rebuild(self) -> None:
        """Groups the slots that have a weight by tensor, on each tensor's device."""
        slots = (self.positions >= 0).nonzero().squeeze(1)
        groups = self.layout.groups(self.positions[slots])
        self._occupied = replace(groups, places=slots[groups.places])
        self._members, self.held = {}, int(slots[-1].item()) + 1 if slots.numel() else 0

    def _fill(self, positions: Tensor, base: Tensor) -> None:
        """Replaces all positions; the slots after the given ones are empty."""
        self.positions.fill_(-1)
        self.positions[: positions.numel()] = positions
        self.base.zero_()
        self.base[: base.numel()] = base
        self.rebuild()
