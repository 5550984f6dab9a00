"""Writes and reads the messages that a publisher sends. docs/sync.md specifies their bytes.

A message is a header of 128 bytes and a payload. It is checked whole before any part of it is used, and nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.delta.rice import decode, encode
from unmask.reading import Malformed, count, fields, items, one_of, parse_json, text
from unmask.sync.header import CHECKSUM, HEADER, Header, Kind
from unmask.sync.support import DTYPES, Change, Places, Support, Table, TensorSpec, bits_dtype

_UNIT = 8  # Each part of a payload begins at a multiple of so many bytes.


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
        if _checksum(view) != bytes(view[CHECKSUM : HEADER.size]):
            raise Malformed("its checksum is another one, so it is cut or damaged")
        return cls(header, view[HEADER.size :])

    def content(self, held: Support) -> Content:
        """Reads the payload.

        Args:
            held: The support that an EPOCH changes and a STEP keeps. A FULL message brings its own.

        Raises:
            Malformed: The payload does not fit the support, or has a form that no publisher writes.
        """
        if self.header.kind == Kind.STEP:
            return self._values(held, Change({}, {}), {}, 0)
        meta = _META[self.header.kind](parse_json(bytes(self.payload[: self.header.meta])), "the JSON")
        old = Support(_table(meta["tensors"])) if self.header.kind == Kind.FULL else held
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


def write_message(
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
            [new.base for new in change.added.values()],
            list(once.values()),
        ]
    parts += [list(placed), list(whole)]
    payload = sum(_aligned(sum(each.nbytes for each in part)) for part in parts)
    message = bytearray(HEADER.size + payload)
    message[: HEADER.size] = replace(header, meta=len(meta), payload=payload).pack()
    target, at = np.frombuffer(message, np.uint8), HEADER.size
    for part in parts:
        for each in part:
            little = each.astype(each.dtype.newbyteorder("<"), copy=False)
            target[at : at + each.nbytes] = little.view(np.uint8)
            at += each.nbytes
        at = _aligned(at)
    message[CHECKSUM : HEADER.size] = _checksum(memoryview(message))
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
    sha = hashlib.sha256(message[:CHECKSUM])
    sha.update(message[HEADER.size :])
    return sha.digest()


def _aligned(size: int) -> int:
    """Returns a number of bytes rounded up to a multiple of `_UNIT`."""
    return -(-size // _UNIT) * _UNIT
