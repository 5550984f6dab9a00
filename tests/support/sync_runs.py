"""Holds a trainer and a receiver in one process, a transport that lets a test change messages, and a plain reader of them."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import nets
import numpy as np
import torch
from helpers import assert_same_tensors, snapshot
from torch import Tensor, nn

import unmask
from unmask.sync import InProcess, Publisher, Receiver, Sent
from unmask.sync.header import Header


class Tape(InProcess):
    """Keeps every message, and delivers it if ``passing``; a test delivers others itself."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[bytes] = []
        self.passing = True

    def send(self, header: Header, message: bytearray) -> None:
        self.messages.append(bytes(message))
        if self.passing:
            super().send(header, message)

    def wanted(self) -> bool:
        return self.passing and super().wanted()

    def deliver(self, data: bytes) -> None:
        for inbox in list(self._inboxes):
            inbox.put(bytearray(data), full=False)


class Pair:
    """A model in training, and the copy that follows it.

    Attributes:
        model: The trainer's model.
        rollout: The receiver's model: the base, until messages come.
        base: The tensors of both before training.
    """

    def __init__(
        self,
        method: unmask.Method,
        model: nn.Module | None = None,
        loss: Callable[[nn.Module, int], Tensor] | None = None,
        transport: Any = None,
        rollout: nn.Module | None = None,
        fused: Any = None,
        shard: Any = None,
        **patterns: Any,
    ) -> None:
        self.model = nets.mixed() if model is None else model
        self.rollout = copy.deepcopy(self.model) if rollout is None else rollout
        self.base = snapshot(self.rollout)
        self.tape = Tape() if transport is None else transport
        self.loss = loss or (lambda model, step: nets.loss(model, nets.tokens(step)))
        self.selection = unmask.select(self.model, method, **patterns)
        self.optimizer = torch.optim.AdamW(self.selection.parameters(), lr=1e-2)
        self.publisher = Publisher(self.selection, self.tape)
        self.receiver = Receiver(self.rollout, self.tape, fused=fused, shard=shard)
        self.steps = 0

    def train(self) -> None:
        self.loss(self.model, self.steps).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def step(self) -> Sent:
        """Trains one step and sends it; the receiver takes it unless the tape keeps it."""
        self.train()
        sent = self.publisher.publish()
        if getattr(self.tape, "passing", True):
            assert self.receiver.receive(timeout=5) == sent.version
            self.assert_equal()
        return sent

    def assert_equal(self) -> None:
        assert_same_tensors(snapshot(self.rollout), snapshot(self.model))


def signed(message: bytes) -> bytes:
    """Returns a message with the checksum that its bytes have."""
    data = bytearray(message)
    data[96:128] = hashlib.sha256(data[:96] + data[128:]).digest()
    return bytes(data)


SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


class PlainReader:
    """Reads messages as docs/sync.md specifies them, by the standard library and numpy alone. It trusts what it reads.

    Attributes:
        tensors: The entries of each tensor of a base, as unsigned integers of its bits: changed in place.
    """

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.table: list[list[Any]] = []
        self.places: dict[int, np.ndarray] = {}
        self.base: dict[int, dict[int, int]] = {}
        self.whole: list[int] = []
        self.version = 0

    def read(self, data: bytes) -> None:
        magic, form, kind, _, meta, version, _, _, size, _, base, sums = struct.unpack(
            "<8sHBBIQQQQ16s32s32s", data[:128]
        )
        assert (magic, form, len(data)) == (b"UNMKSYNC", 1, 128 + size)
        assert hashlib.sha256(data[:96] + data[128:]).digest() == sums
        self.payload, self.at = data[128:], meta
        if kind != 3:
            self._change(json.loads(self.payload[:meta]), full=kind == 1)
            every = (np.array([self.base[n][i] for i in self.places[n]], self._kind(n)) for n in sorted(self.places))
            assert hashlib.sha256(b"".join(each.tobytes() for each in every)).digest() == base
        for number in sorted(self.places):
            self._entries(number)[self.places[number]] = self._take(number, len(self.places[number]))
        self._align()
        for number in self.whole:
            entries = self._entries(number)
            entries[:] = self._take(number, len(entries))
        self._align()
        assert self.at == len(self.payload)
        self.version = version

    def _change(self, meta: dict[str, Any], full: bool) -> None:
        if full:
            assert not self.table, "this reader takes one FULL message"
            self.table = meta["tensors"]
        gone = {row[0]: self._indices(*row) for row in meta["removed"]}
        new = {row[0]: self._indices(*row) for row in meta["added"]}
        self._align()
        for number, indices in gone.items():
            self._entries(number)[indices] = [self.base[number].pop(int(i)) for i in indices]
        for number, indices in new.items():
            self.base.setdefault(number, {}).update(
                zip(indices.tolist(), self._take(number, len(indices)).tolist(), strict=True)
            )
        self._align()
        for number in meta.get("once", []):
            self._entries(number)[:] = self._take(number, len(self._entries(number)))
        self._align()
        for number, indices in new.items():  # the base is the receiver's own
            assert self._entries(number)[indices].tolist() == [self.base[number][int(i)] for i in indices]
        self.places = {n: np.array(sorted(base), np.int64) for n, base in self.base.items() if base}
        self.whole = sorted({*self.whole, *meta["whole"]})

    def _indices(self, number: int, count: int, parameter: int, length: int) -> np.ndarray:
        """Decodes indices bit by bit: the remainders, and then the quotients in unary."""
        bits = np.unpackbits(self._read(length, "u1"), bitorder="little").tolist()
        numel = len(self._entries(number))
        inverse = 2 * count > numel
        listed, at = numel - count if inverse else count, 0
        remainders = [sum(bits[i * parameter + j] << j for j in range(parameter)) for i in range(listed)]
        at, last, found = -(-listed * parameter // 8) * 8, -1, []
        for remainder in remainders:
            end = bits.index(1, at)
            last += ((end - at) << parameter) + remainder + 1
            found.append(last)
            at = end + 1
        others = sorted(set(range(numel)) - set(found)) if inverse else found
        return np.array(others, np.int64)

    def _entries(self, number: int) -> np.ndarray:
        return self.tensors[self.table[number][0]]

    def _kind(self, number: int) -> str:
        return f"<u{SIZES[self.table[number][1]]}"

    def _take(self, number: int, count: int) -> np.ndarray:
        return self._read(count, self._kind(number))

    def _read(self, count: int, kind: str) -> np.ndarray:
        found = np.frombuffer(self.payload, kind, count, self.at)
        self.at += found.nbytes
        return found

    def _align(self) -> None:
        self.at = -(-self.at // 8) * 8


def as_bits(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns copies of tensors as flat vectors of unsigned integers of the same bits."""
    return {
        name: tensor.detach()
        .contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .copy()
        .view(f"<u{tensor.element_size()}")
        for name, tensor in tensors.items()
    }
