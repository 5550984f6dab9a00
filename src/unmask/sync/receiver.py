"""Receiver: writes what a publisher sends into a copy of the base model, exactly and all or nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from unmask.errors import SyncError, SyncTimeoutError
from unmask.reading import Malformed
from unmask.sync.header import Header, Kind
from unmask.sync.message import Content, Message
from unmask.sync.original import Original, as_values, entries_write
from unmask.sync.support import Support, bits_of
from unmask.sync.targets import Fused, Region, Shards, Targets, refuse_unwritable
from unmask.sync.transport import Held, Transport
from unmask.sync.writing import Entries, Write, apply, held_bits, value_writes


@dataclass(frozen=True, eq=False)
class _State:
    """The state of a receiver after a message.

    Attributes:
        header: The message's header.
        content: The message's content.
        regions: Where each published tensor lies in the receiver's model, by its name.
        entries: The entries that hold the places of each published tensor, by its number.
        whole: The receiver's tensors that are written whole, and copies of what they held before the first message; by name.
    """

    header: Header
    content: Content
    regions: dict[str, list[Region]]
    entries: dict[int, list[Entries]]
    whole: dict[str, tuple[Tensor, Tensor]]

    @property
    def support(self) -> Support:
        """The support."""
        return self.content.support

    def values(self) -> Iterator[Write]:
        """Yields the writes that bring the state's values into the model."""
        return value_writes(self.content, self.entries, self.regions)

    def original(self) -> Original:
        """Returns what the model held before the first message."""
        written: dict[str, list[tuple[Entries, NDArray]]] = {}
        for number, found in self.entries.items():
            for each in found:
                written.setdefault(each.region.name, []).append((each, each.own(self.support.places[number].base)))
        return Original(written, self.whole)


class Receiver:
    """Writes a publisher's messages into a copy of the base model: the same names, dtypes and values as before training.

    A message is checked whole before the first write: its checksum, its version, the shapes and dtypes, and the base values at
    the places, bit for bit. If a write fails, the earlier ones are undone. So the model holds one version, never parts of two.
    Positions are resolved when the support changes; every other message costs O(B).

    Args:
        model: The receiver's model. It must hold the base, and nothing else may write to it.
        transport: The publisher's transport, or one of the same folder or group.
        fused: The tensors of the model that are several of the publisher's, one below the other: the names of the parts, by the
            name of the whole. A ``*`` stands for the same text in all of them:
            ``{"*.qkv_proj.weight": ["*.q_proj.weight", "*.k_proj.weight", "*.v_proj.weight"]}``. A single part renames a tensor.
        shard: The part of the publisher's tensors that the model has, by their names (with ``*``): a `Shard`, or
            ``(dim, start, stop)`` where dim is 0 for rows and 1 for columns. Parts of a fused tensor are cut one by one.

    Raises:
        SyncError: The model is quantised or has a live selection, or a pattern of ``fused`` is wrong.

    Example:
        >>> import copy, unmask
        >>> model, transport = nn.Linear(8, 4), unmask.sync.InProcess()
        >>> receiver = Receiver(copy.deepcopy(model), transport)
        >>> publisher = unmask.sync.Publisher(unmask.select(model, unmask.pafi(budget=6)), transport)
        >>> receiver.version, publisher.publish().version, receiver.receive()
        (0, 1, 1)
    """

    def __init__(
        self, model: nn.Module, transport: Transport, fused: Fused | None = None, shard: Shards | None = None
    ) -> None:
        self._targets = Targets(model, fused, shard)
        self._inbox = transport.inbox()
        self._state: _State | None = None

    @property
    def version(self) -> int:
        """The number of the version that the model holds; 0 for the base."""
        return 0 if self._state is None else self._state.header.version

    @property
    def epoch(self) -> int:
        """The epoch of the version that the model holds; 0 for the base."""
        return 0 if self._state is None else self._state.header.epoch

    def receive(self, timeout: float | None = None) -> int:
        """Waits for the next message, writes it into the model, and returns the version that the model then holds.

        A message of a version that is held already is passed over. After an error the model is as it was before, and the receiver
        asks for a FULL message (one that holds everything), which it takes at any time. On a GPU the writes are queued in the
        current stream, as those of any operation.

        Args:
            timeout: The most seconds to wait; None to wait for good, or as long as a process group waits.

        Raises:
            SyncTimeoutError: No message came in time.
            SyncError: A message is damaged, one before it is missing, or the publisher's base is another one.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            held = Held() if self._state is None else Held(self._state.header.run, self.version)
            try:
                message = self._inbox.receive(held, left)
                if message.header.run == held.run and message.header.version <= held.version:
                    continue
                self._check_order(message.header)
                self._take(message)
            except SyncTimeoutError:
                raise
            except SyncError:
                self._inbox.ask()
                raise
            return self.version

    def _check_order(self, header: Header) -> None:
        """Refuses a message that is not the next one, unless it is a FULL one of the same publisher or of a later one."""
        held = None if self._state is None else self._state.header
        if header.kind == Kind.FULL:
            if held is not None and held.run != header.run and held.started >= header.started:
                raise SyncError(
                    f"a FULL message of version {header.version} came from a publisher that had started before the one "
                    f"whose version {held.version} is held. Nothing was changed."
                )
            return
        if held is None or held.run != header.run:
            raise SyncError(
                f"version {header.version} came from a publisher of which no FULL message has come: the receiver has joined "
                "late, or the publisher was started again. Nothing was changed; publisher.resync() sends a FULL message."
            )
        if header.version != held.version + 1:
            raise SyncError(
                f"version {header.version} came, and version {held.version} is held: {header.version - held.version - 1} are "
                "missing. Nothing was changed; publisher.resync() sends a FULL message."
            )
        if header.epoch != held.epoch + (header.kind == Kind.EPOCH) or (
            header.kind == Kind.STEP and header.base != held.base
        ):
            raise SyncError(
                f"version {header.version} is of epoch {header.epoch}, with other places than the receiver holds (epoch "
                f"{held.epoch}). Nothing was changed; publisher.resync() sends a FULL message."
            )

    def _take(self, message: Message) -> None:
        """Writes a message that is in order into the model."""
        held, header = self._follow(), message.header
        try:
            content = message.content(Support(()) if held is None else held.support)
        except Malformed as malformed:
            raise SyncError(
                f"version {header.version} cannot be used: {malformed}. Nothing was changed."
            ) from malformed
        if header.kind == Kind.FULL or held is None:
            self._take_full(header, content, held)
        elif header.kind == Kind.EPOCH:
            self._take_epoch(header, content, held)
        else:
            state = replace(held, header=header, content=content)
            apply(state.values(), back=held.values)
            self._state = state

    def _take_full(self, header: Header, content: Content, held: _State | None) -> None:
        """Takes the model back to its base, and writes a FULL message."""
        support = content.support
        regions = self._targets.regions(support.table)
        entries = _all_resolved(support, regions)
        refuse_unwritable(regions)
        original = Original() if held is None else held.original()
        _check_base(support, content.once, entries, {n: p.base for n, p in support.places.items()}, original)
        whole = _copies(support, (*content.once, *support.whole), regions, original)
        state = _State(header, content, regions, entries, whole)
        apply([*original.writes(), *_once_writes(content, regions), *state.values()])
        self._state = state
        self._targets.remember()

    def _take_epoch(self, header: Header, content: Content, held: _State) -> None:
        """Writes a message by which places join or leave; a place that leaves gets its base value back."""
        support, change, regions = content.support, content.change, held.regions
        joining = {number: _resolved(support, number, new.indices, regions) for number, new in change.added.items()}
        _check_base(support, {}, joining, {n: new.base for n, new in change.added.items()}, Original())
        leaving = []
        for number, gone in change.removed.items():
            base = held.support.places[number].base_at(gone)
            leaving += [entries_write(e, e.own(base)) for e in _resolved(held.support, number, gone, regions)]
        touched = change.added.keys() | change.removed.keys()
        entries = {
            number: _resolved(support, number, places.indices, regions) if number in touched else held.entries[number]
            for number, places in support.places.items()
        }
        whole = held.whole
        if change.whole:
            whole = _copies(support, change.whole, regions, held.original()) | whole
        state = _State(header, content, regions, entries, whole)
        apply([*leaving, *state.values()])
        self._state = state

    def _follow(self) -> _State | None:
        """Returns what is held, after looking for the tensors again if the model was moved to other memory."""
        held = self._state
        if held is None or not self._targets.moved():
            return held
        regions = self._targets.regions(held.support.table)
        moved = replace(held, regions=regions, entries=_all_resolved(held.support, regions))
        tensors = {region.name: region.tensor for each in regions.values() for region in each}
        moved = replace(moved, whole={name: (tensors[name], before) for name, (_, before) in held.whole.items()})
        wanted = [(tensor, flat, values) for tensor, flat, values in moved.values() if flat is not None]
        found = held_bits([(tensor, flat) for tensor, flat, _ in wanted])
        if any(not np.array_equal(bits, bits_of(values)) for bits, (_, _, values) in zip(found, wanted, strict=True)):
            raise SyncError(
                f"the receiver's model holds other weights than those of version {held.header.version}: they were loaded or "
                "replaced. Load the base, and make another Receiver."
            )
        self._state = moved
        self._targets.remember()
        return moved


def _resolved(support: Support, number: int, indices: NDArray, regions: Mapping[str, list[Region]]) -> list[Entries]:
    """Returns the receiver's entries for some indices of a published tensor.

    Raises:
        SyncError: The receiver's model lacks the tensor.
    """
    return [Entries.of(region, indices) for region in _regions_of(support, number, regions)]


def _all_resolved(support: Support, regions: Mapping[str, list[Region]]) -> dict[int, list[Entries]]:
    """Returns the receiver's entries for all places of a support, by the published tensor's number."""
    return {number: _resolved(support, number, places.indices, regions) for number, places in support.places.items()}


def _regions_of(support: Support, number: int, regions: Mapping[str, list[Region]]) -> list[Region]:
    """Returns where a published tensor lies, or raises a `SyncError` if the receiver's model lacks it."""
    name = support.table[number].name
    if name not in regions:
        raise SyncError(
            f"the receiver's model has no tensor {name!r}, which the publisher trains. Nothing was changed; fused= says which "
            "tensors hold others, or have other names."
        )
    return regions[name]


def _check_base(
    support: Support,
    once: Mapping[int, NDArray],
    entries: Mapping[int, list[Entries]],
    base: Mapping[int, NDArray],
    original: Original,
) -> None:
    """Refuses a publisher whose base differs from the receiver's, bit for bit, at one of the entries.

    Args:
        support: The support.
        once: The tensors that a message brings as they were before training, as bits by number.
        entries: The entries to look at, by number.
        base: The base values of the publisher at these entries, as bits by number.
        original: What the receiver's model was.
    """
    wanted = [(number, each) for number, found in entries.items() if number not in once for each in found]
    for (number, each), bits in zip(wanted, original.bits([each for _, each in wanted]), strict=True):
        other = bits != each.own(base[number])
        if other.any():
            raise SyncError(
                f"the receiver's model is not the publisher's base: {each.region.name!r} has other values at "
                f"{np.count_nonzero(other):,} of {other.size:,} places of {support.table[number].name!r}. Nothing was changed. "
                "Load the base that the trainer started from, in the same dtype."
            )


def _copies(
    support: Support, numbers: tuple[int, ...], regions: Mapping[str, list[Region]], original: Original
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the receiver's tensors that hold some published tensors, and copies of what they were; by name."""
    found = {region.name: region for number in numbers for region in _regions_of(support, number, regions)}
    return {name: (region.tensor, original.copy_of(region)) for name, region in found.items()}


def _once_writes(content: Content, regions: Mapping[str, list[Region]]) -> Iterator[Write]:
    """Yields the writes of the tensors that the base lacks, as they were before training."""
    for number, bits in content.once.items():
        spec = content.support.table[number]
        for region in regions[spec.name]:
            yield region.view(), None, region.cut(as_values(bits, region.tensor).view(spec.shape))
