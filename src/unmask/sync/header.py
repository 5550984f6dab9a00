"""Defines the header of a message: its kind, version, run and lengths. docs/sync.md specifies its bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from unmask.reading import Malformed

_MAGIC = b"UNMKSYNC"
FORMAT = 1
"""The version of the messages' form."""
HEADER = struct.Struct("<8sHBBIQQQQ16s32s32s")
"""The header, 128 bytes: magic, format, kind, 0, and the fields of `Header`; the last 32 bytes are the checksum."""
CHECKSUM = HEADER.size - 32
"""The place of the checksum in a header."""


class Kind(IntEnum):
    """Says what a message holds.

    Attributes:
        FULL: The message holds all that a receiver must know: the table, the places, their base values and the values.
        EPOCH: The message says which places join and leave, and holds the values of all.
        STEP: The message holds values only.
    """

    FULL = 1
    EPOCH = 2
    STEP = 3

    @property
    def word(self) -> str:
        """The kind in a word: ``"full"``, ``"epoch"`` or ``"step"``."""
        return self.name.lower()


@dataclass(frozen=True)
class Header:
    """Holds the fields of a message's header.

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
        if magic != _MAGIC:
            raise Malformed("it does not begin with UNMKSYNC")
        if version != FORMAT:
            raise Malformed(f"it has format {version}; this version of unmask reads format {FORMAT}")
        if kind not in list(Kind) or zero:
            raise Malformed(f"it has kind {kind}; there are 1 (FULL), 2 (EPOCH) and 3 (STEP)")
        number, epoch, started, payload = numbers
        if meta > payload or (kind == Kind.STEP) != (meta == 0):
            raise Malformed(f"its header names {meta:,} bytes of JSON in a payload of {payload:,}")
        if not number or not epoch or max(numbers) >= 2**63:
            raise Malformed(
                f"its header has version {number}, epoch {epoch} and start {started}, which no publisher has"
            )
        return cls(Kind(kind), meta, number, epoch, started, payload, run, base)

    def pack(self) -> bytes:
        """Returns the 128 bytes of the header, with a checksum of zeros."""
        numbers = (self.meta, self.version, self.epoch, self.started, self.payload)
        return HEADER.pack(_MAGIC, FORMAT, self.kind, 0, *numbers, self.run, self.base, bytes(32))
