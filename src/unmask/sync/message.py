"""Writes and reads the messages that a publisher sends. docs/sync.md specifies their bytes.

A message is a header of 128 bytes and a payload. It is checked whole before any part of it is used, and nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.delta.rice import decode, encode
from unmask.reading import Malformed, count, fields, items, one_of, parse_json, text
from unmask.sync.support import DTYPES, Change, Places, Support, Table, TensorSpec, bits_dtype

MAGIC = b"UNMKSYNC"
FORMAT = 1
HEADER = struct.Struct("<8sHBBIQQQQ16s32s32s")
"""The header, 128 bytes: magic, format, kind, 0, and the fields of `Header`; the last 32 bytes are the checksum."""
_CHECKSUM = HEADER.size - 32
_UNIT = 8  # Each part of a payload begins at a multiple of so many bytes.


class Kind(IntEnum):
    """The kinds of messages.

    Attributes:
        FULL: The message holds all that a receiver must know: the table, the places, their base values and the values.
        EPOCH: The message says which places join and leave, and holds the values of all.
        STEP: The message holds values only.
    """

    FULL = 1
    EPOCH = 2
    STEP = 3


@dataclass(frozen=True)
class Header:
    """The header of a message.

    Attributes:
        kind: The kind.
        meta: The number of bytes of the JSON at the start of the payload; 0 in a STEP.
        version: The number of the message, from 1; each message of a run has the next one.
        epoch: The number of times that the support has changed, from 1.
        started: The time at which the publisher started: nanoseconds since 1970. A later run has a larger number.
        payload: The number of bytes after the header.
        run: 16 random bytes that a publisher draws when it starts.
        base: The SHA-256 over the base values at all places (`Support.digest`).
    """

    kind: Kind
    meta: int
    version: int
    epoch: int
    started: int
    payload: int
    run: bytes
    base: bytes

    @classmethod
    def read(cls, data: bytes | bytearray | memoryview) -> Header:
        """Reads the first 128 bytes of a message; the checksum is left to `Message.read`.

        Raises:
            Malformed: It is no header of a message, or one of another format.
        """
        if len(data) < HEADER.size:
            raise Malformed(f"it has {len(data)} bytes, and a header has {HEADER.size}")
        magic, version, kind, zero, meta, *numbers, run, base, _ = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise Malformed("it does not begin with UNMKSYNC")
        if version != FORMAT:
            raise Malformed(f"it has format {version}; this version of unmask reads format {FORMAT}")
        if kind not in list(Kind) or zero or (kind == Kind.STEP) != (meta == 0):
            raise Malformed("its header has a kind that there is not")
        number, epoch, started, payload = numbers
        if meta > payload or not number or not epoch or max(numbers) >= 2**63:
            raise Malformed("its header has a number that cannot be")
        return cls(Kind(kind), meta, number, epoch, started, payload, run, base)


@dataclass(frozen=True)
class Message:
    """A message whose checksum is right.

    Attributes:
        header: The header.
        payload: All bytes after the header.
    """

    header: Header
    payload: memoryview

    @classmethod
    def read(cls, data: bytearray | memoryview) -> Message:
        """Reads a message.

        Raises:
            Malformed: The message is cut, damaged, or of another format.
        """
        view = memoryview(data)
        header = Header.read(view)
        if len(view) != HEADER.size + header.payload:
            raise Malformed(f"it has {len(view):,} bytes, and its header says {HEADER.size + header.payload:,}")
        if _checksum(view) != bytes(view[_CHECKSUM : HEADER.size]):
            raise Malformed("its checksum is another one, so it is cut or damaged")
        return cls(header, view[HEADER.size :])

    def content(self, held: Support | None) -> Content:
        """Reads the payload of a FULL message, or that of an EPOCH or STEP that follows the given support.

        Raises:
            Malformed: The payload does not fit the support, or has a form that no publisher writes.
        """
        if self.header.kind == Kind.STEP:
            assert held is not None, "a STEP follows a support"
            return self._values(held, Change({}, {}), {}, 0)
        meta = _META[self.header.kind](parse_json(bytes(self.payload[: self.header.meta])), "the JSON")
        full = self.header.kind == Kind.FULL
        assert full or held is not None, "an EPOCH follows a support"
        old = Support(_table(meta["tensors"])) if full or held is None else held
        reader = _Reader(self.payload, self.header.meta, old.table)
        removed = reader.indices(meta["removed"], {n: each.indices.size for n, each in old.places.items()})
        joining = reader.indices(meta["added"])
        reader.align()
        added = {n: Places(indices, reader.take(n, indices.size)) for n, indices in joining.items()}
        reader.align()
        whole = reader.numbers(meta["whole"])
        once = {n: reader.take(n, old.table[n].numel) for n in reader.numbers(meta.get("once", []))}
        reader.align()
        if both := once.keys() & set(whole):
            raise Malformed(f"{old.table[min(both)].name!r} is sent whole twice")
        change = Change(removed, added, whole)
        return self._values(old.after(change), change, once, reader.at)

    def _values(self, support: Support, change: Change, once: Mapping[int, NDArray], start: int) -> Content:
        placed, whole = support.sizes()
        middle = start + _aligned(placed)
        if middle + _aligned(whole) != len(self.payload):
            raise Malformed(
                f"its values have {len(self.payload) - start:,} bytes, and {_aligned(placed) + _aligned(whole):,} are due"
            )
        if self.header.kind != Kind.STEP and support.digest() != self.header.base:
            raise Malformed("the base values in it are not those that its header names")
        values = self.payload[start : start + placed], self.payload[middle : middle + whole]
        return Content(support, change, once, *values)


@dataclass(frozen=True)
class Content:
    """The payload of a message.

    Attributes:
        support: The support from this message on.
        change: What joins and leaves; in a FULL message all places join.
        once: The tensors that the base lacks, as they were before training, as bits by number; only in a FULL message.
        placed: The bytes of the values at the places, in order.
        whole: The bytes of the tensors that are sent whole, in order.
    """

    support: Support
    change: Change
    once: Mapping[int, NDArray]
    placed: memoryview
    whole: memoryview


class _Reader:
    """Reads the parts of a payload that come before the values."""

    def __init__(self, payload: memoryview, start: int, table: Table) -> None:
        self.payload, self.at, self.table = payload, start, table

    def numbers(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Returns numbers of tensors, if they ascend and are in the table."""
        if any(a >= b for a, b in pairwise(numbers)) or (numbers and numbers[-1] >= len(self.table)):
            raise Malformed("its JSON has numbers of tensors that do not ascend, or are not in the table")
        return tuple(numbers)

    def indices(self, rows: Sequence[Sequence[int]], most: Mapping[int, int] | None = None) -> dict[int, NDArray]:
        """Reads the indices of some tensors, by number.

        Args:
            rows: A number, a count of indices, a Rice parameter and a count of bytes for each tensor.
            most: The most indices that a tensor can have; None for as many as the payload has base values for.
        """
        self.numbers([number for number, *_ in rows])
        found = {}
        for number, size, parameter, length in rows:
            spec = self.table[number]
            least = len(self.payload) // spec.itemsize if most is None else most.get(number, 0)
            if not 0 < size <= least:
                raise Malformed(f"{spec.name!r} cannot have {size:,} of its indices")
            found[number] = decode(self._read(length, np.dtype(np.uint8)), parameter, size, spec.numel)
        return found

    def take(self, number: int, size: int) -> NDArray:
        """Reads some entries of a tensor, as bits."""
        dtype = bits_dtype(self.table[number])
        return self._read(size, dtype).astype(dtype.newbyteorder("="))

    def align(self) -> None:
        """Goes to the next part."""
        self.at = _aligned(self.at)

    def _read(self, size: int, dtype: np.dtype) -> NDArray:
        if size * dtype.itemsize > len(self.payload) - self.at:
            raise Malformed("it is shorter than its JSON says")
        found = np.frombuffer(self.payload, dtype, size, self.at)
        self.at += size * dtype.itemsize
        return found


def _row(value: Any, where: str) -> Any:
    if len(items(count)(value, where)) != 4:
        raise Malformed(f"{where} must be a number, a count, a parameter and a length")
    return value


def _spec(value: Any, where: str) -> Any:
    if not isinstance(value, list) or len(value) != 4:
        raise Malformed(f"{where} must be a name, a dtype, a shape and other names")
    for form, each in zip((text, one_of(*DTYPES), items(count), items(text)), value, strict=True):
        form(each, where)
    return value


_PARTS = {"removed": items(_row), "added": items(_row), "whole": items(count)}
_META = {
    Kind.EPOCH: fields(_PARTS, closed=True),
    Kind.FULL: fields({**_PARTS, "tensors": items(_spec), "once": items(count)}, closed=True),
}


def _table(rows: list[Any]) -> Table:
    """Reads the table of a FULL message, which is sorted, names each tensor once and has shapes that can be."""
    table = tuple(TensorSpec(name, dtype, tuple(shape), tuple(others)) for name, dtype, shape, others in rows)
    names = [name for spec in table for name in (spec.name, *spec.others)]
    if any(a.order >= b.order for a, b in pairwise(table)) or len(set(names)) < len(names):
        raise Malformed("its table of tensors is not sorted, or names a tensor twice")
    for spec in table:
        if len(spec.shape) > 64 or math.prod(spec.shape) * spec.itemsize >= 2**63:
            raise Malformed(f"{spec.name!r} has shape {spec.shape}, which no tensor has")
    return table


def write(
    header: Header,
    support: Support,
    change: Change | None,
    once: Mapping[int, NDArray],
    placed: Iterable[NDArray],
    whole: Iterable[NDArray],
) -> bytearray:
    """Writes a message.

    Args:
        header: The header; its ``meta`` and ``payload`` are filled in here.
        support: The support from this message on; a FULL message holds its table.
        change: What joins and leaves; None in a STEP.
        once: See `Content`.
        placed: The values at the places, as bits, in order.
        whole: The tensors that are sent whole, as bits, in order.
    """
    parts: list[list[NDArray]] = []
    meta = b""
    if change is not None:
        table = support.table
        removed = _coded(table, change.removed)
        added = _coded(table, {number: new.indices for number, new in change.added.items()})
        lists: dict[str, Any] = {
            "removed": [row for row, _ in removed],
            "added": [row for row, _ in added],
            "whole": list(change.whole),
        }
        if header.kind == Kind.FULL:
            lists["tensors"] = [[s.name, s.dtype, list(s.shape), list(s.others)] for s in table]
            lists["once"] = list(once)
        meta = json.dumps(lists, separators=(",", ":")).encode()
        meta += b" " * (_aligned(len(meta)) - len(meta))
        parts = [
            [np.frombuffer(meta, np.uint8)],
            [code for _, code in (*removed, *added)],
            [new.base.astype(bits_dtype(table[number]), copy=False) for number, new in change.added.items()],
            [bits.astype(bits_dtype(table[number]), copy=False) for number, bits in once.items()],
        ]
    parts += [list(placed), list(whole)]
    payload = sum(_aligned(sum(each.nbytes for each in part)) for part in parts)
    message = bytearray(HEADER.size + payload)
    numbers = (len(meta), header.version, header.epoch, header.started, payload)
    HEADER.pack_into(message, 0, MAGIC, FORMAT, header.kind, 0, *numbers, header.run, header.base, bytes(32))
    target, at = np.frombuffer(message, np.uint8), HEADER.size
    for part in parts:
        end = at
        for each in part:
            target[end : end + each.nbytes] = each.view(np.uint8)
            end += each.nbytes
        at += _aligned(end - at)
    message[_CHECKSUM : HEADER.size] = _checksum(memoryview(message))
    return message


def _coded(table: Table, indices: Mapping[int, NDArray]) -> list[tuple[list[int], NDArray]]:
    """Returns each tensor's row in the JSON (number, count, Rice parameter, bytes) and the code of its indices."""
    found = []
    for number, each in indices.items():
        code, parameter = encode(each, table[number].numel)
        found.append(([number, each.size, parameter, code.nbytes], code))
    return found


def _checksum(message: memoryview) -> bytes:
    """Returns the SHA-256 over a message without its checksum."""
    sha = hashlib.sha256(message[:_CHECKSUM])
    sha.update(message[HEADER.size :])
    return sha.digest()


def _aligned(size: int) -> int:
    """Returns a number of bytes rounded up to a multiple of `_UNIT`."""
    return -(-size // _UNIT) * _UNIT
