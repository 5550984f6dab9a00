"""Keeps the k best of many entries on a GPU by two Triton kernels, without making the host wait for the device.

The buffer begins empty, and the *cut-off*, an entry that lives on the device, begins at the floor. One kernel scores a block of
entries and appends those that come before the cut-off, at places that an atomic counter gives out. The other one cuts a buffer
that has become too full back to its k best entries; the last of them is the new cut-off. So at every time the buffer holds the k
best of all that was offered: what is not in it comes after k entries that are.

The host knows how many entries it has offered since it last launched the second kernel, and launches it before they could be
more than fit. The buffer never overflows, and nothing has to be offered twice. The order in which entries reach the buffer is
that of the atomics, but which entries stay depends on (score, position) alone, and a position occurs once.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unmask.gradients import triton_sampled
from unmask.ranking.topk import Ranked, in_order

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the gradients and weights that the kernel scores
_APPENDED = 2048  # The entries of a program of the first kernel.
_READ = 8192  # The entries that the second kernel, which is one program, reads at a time.
_LEAST, _ROOM, _FULL = 1 << 16, 1 << 24, 1 << 20  # See `Sizes.of`.
_SIGN = 0x7FFFFFFF
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}  # A fused product and sum is not rounded as torch rounds it.


@dataclass(frozen=True)
class Formula:
    """A score that the kernel computes from a gradient g and a weight w in float32, to the bits that torch gives.

    Attributes:
        kind: ``"gradient"``, |g|; ``"snip"``, |g w|; ``"d3"``, |g| / (|w| + eps)^power; or ``"given"``: torch has made the
            scores.
        eps: The number eps of D3.
        power: The power of D3: -1, 1 or 2, which torch computes by divisions and products. Other powers are not rounded
            in the same way by torch and Triton.
    """

    kind: Literal["gradient", "snip", "d3", "given"]
    eps: float = 1.0
    power: int = 1


GIVEN = Formula("given")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a buffer, in entries of 16 bytes.

    Attributes:
        keep: The number k of best entries.
        full: The number of entries above which a buffer is cut back to k.
        room: The largest number of entries that may be offered before the buffer is looked at again.
        total: The number of entries that may be offered in all; their positions are below it.
    """

    keep: int
    full: int
    room: int
    total: int

    @property
    def capacity(self) -> int:
        """The entries that fit into the buffer."""
        return min(self.full + self.room, self.total)

    @classmethod
    def of(cls, keep: int, total: int) -> Sizes:
        """Returns the sizes for the k best of ``total`` entries.

        Besides 32 bytes for each of the k best, a buffer takes at most half a byte for each entry offered.

        Example:
            >>> Sizes.of(28_000, 6_500_000_000)
            Sizes(keep=28000, full=1048576, room=16777216, total=6500000000)
        """
        share = 1 << (max(_LEAST, total // 64).bit_length() - 1)
        return cls(keep, max(2 * keep, min(share, _FULL)), min(share, _ROOM), total)


def available(device: torch.device) -> bool:
    """Returns True if a `BestBuffer` works on a device. Once per process it ranks a few numbers there.

    On ROCm it is False: there the ranking in plain torch serves (`unmask.ranking.unwaiting`).

    Example:
        >>> available(torch.device("meta"))
        False
    """
    return torch.version.hip is None and triton_sampled.available(device) and _works(device)


@cache
def _works(device: torch.device) -> bool:
    numbers = torch.tensor([1.0, 3.0, 2.0], device=device)
    try:
        buffer = BestBuffer(Sizes.of(2, 3), -torch.inf, 1, device)
        buffer.offer(0, 0, 0, numbers, None, None, Formula("gradient"))
        buffer.cut_back()
        return buffer.ranked(int(buffer.status[0].item())).positions.tolist() == [1, 2]
    except Exception as error:  # An old device, a driver or a missing compiler shows here, and not in training.
        warnings.warn(f"Triton does not rank on {device}, plain torch is used instead: {error}", stacklevel=2)
        return False


class BestBuffer:
    """Holds the k best of the entries offered so far, and some more, under (score descending, position ascending).

    Args:
        sizes: The sizes of the buffer.
        floor: The score that an entry must exceed to enter.
        tensors: How many tensors there are.
        device: The device, on which all that is offered must be.

    Attributes:
        status: (1 + tensors,) int32: how many entries the buffer holds; and for each tensor 0 if all of its scores were finite,
            1 if one was infinite, 2 if one was minus infinity, 3 if one was NaN.

    Example:
        >>> device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        >>> if available(device):
        ...     buffer = BestBuffer(Sizes.of(2, 100), 0.0, 1, device)
        ...     buffer.offer(0, 40, 0, torch.tensor([0.0, -2.0, 1.0], device=device), None, None, Formula("gradient"))
        ...     assert buffer.ranked(2).positions.tolist() == [41, 42]
    """

    def __init__(self, sizes: Sizes, floor: float, tensors: int, device: torch.device) -> None:
        self.sizes = sizes
        self.status = torch.zeros(1 + tensors, dtype=torch.int32, device=device)
        self._keys = torch.empty(
            sizes.capacity, dtype=torch.int32, device=device
        )  # scores as integers of the same order
        self._positions = torch.empty(sizes.capacity, dtype=torch.int64, device=device)
        self._payload = torch.empty(sizes.capacity, dtype=torch.float32, device=device)
        self._cut = torch.zeros(2, dtype=torch.int64, device=device)  # key and position
        self._cut[:1].fill_(
            _key(floor)
        )  # A tensor made of a list would be copied to the device, and the host would wait.
        self._offered = 0  # since the second kernel was launched

    def offer(
        self,
        index: int,
        start: int,
        first: int,
        gradient: Tensor,
        other: Tensor | None,
        members: Tensor | None,
        formula: Formula,
    ) -> None:
        """Offers a block of consecutive entries of one tensor: n of them, at most ``sizes.room``.

        Args:
            index: The tensor's number.
            start: The position of the tensor's first entry.
            first: The flat index of the block's first entry in its tensor.
            gradient: (n,) contiguous; it travels with the entries, in float32.
            other: (n,) contiguous: the weights; for the formula ``"given"`` the float32 scores; None for ``"gradient"``.
            members: (m,) int64, ascending: the flat indices in the tensor that are left out; None if there are none.
            formula: How the score is computed.
        """
        size = gradient.numel()
        if self._offered + size > self.sizes.room:
            self._launch_cut(self.sizes.full)
        self._offered += size
        held = 0 if members is None else members.numel()
        append, _ = _kernels()
        with torch.cuda.device_of(gradient):
            append[(-(-size // _APPENDED),)](
                gradient, other, self._positions if members is None else members,
                self._keys, self._positions, self._payload, self.status, self._cut,
                size, start, first, held, held.bit_length(), index, formula.eps,
                KIND=formula.kind, POWER=formula.power, B=_APPENDED, num_warps=4, **_OPTIONS,
            )  # fmt: skip

    def cut_back(self) -> None:
        """Cuts the buffer back to its k best entries, or leaves all where it holds no more."""
        self._launch_cut(self.sizes.keep)

    def _launch_cut(self, limit: int) -> None:
        _, cut = _kernels()
        with torch.cuda.device_of(self._keys):
            cut[(1,)](
                self._keys, self._positions, self._payload, self.status, self._cut,
                self.sizes.keep, limit, self.sizes.total.bit_length(), B=_READ, num_warps=16, **_OPTIONS,
            )  # fmt: skip
        self._offered = 0

    def ranked(self, count: int) -> Ranked:
        """Returns the first k entries of the buffer, of which the host knows by now that it holds ``count``."""
        keys = self._keys[:count]
        scores = (keys ^ ((keys >> 31) & _SIGN)).view(torch.float32)
        return in_order(Ranked(scores, self._positions[:count], self._payload[:count])).first(self.sizes.keep)


def _key(score: float) -> int:
    """Returns the integer of a float32 score that the kernel computes, too: the larger the score, the larger the integer."""
    bits: int = struct.unpack("<i", struct.pack("<f", score))[0]
    return bits ^ ((bits >> 31) & _SIGN)


@cache
def _kernels() -> tuple[Any, Any]:
    """Returns the two kernels. Triton compiles them once per dtype: `do_not_specialize` keeps it from doing so per size."""
    global tl
    import triton
    import triton.language as tl

    varying = ["start", "first", "held", "steps", "index", "eps"]
    return (
        triton.jit(_append_kernel, do_not_specialize=varying),
        triton.jit(_cut_kernel, do_not_specialize=["keep", "limit", "bits"]),
    )


def _append_kernel(  # type: ignore[no-untyped-def]
    gradient, other, members, keys, positions, payload, status, cut,
    size, start, first, held, steps, index, eps,
    KIND: tl.constexpr, POWER: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * B + tl.arange(0, B)
    inside = at < size
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "given":
        score = tl.load(other + at, mask=inside, other=0.0)
    else:
        score = tl.abs(g)
        if KIND == "snip":
            score = tl.abs(g * tl.load(other + at, mask=inside, other=0.0).to(tl.float32))
        if KIND == "d3":  # Triton's plain division is not rounded as IEEE 754 says.
            base = tl.abs(tl.load(other + at, mask=inside, other=0.0).to(tl.float32)) + eps
            if POWER == 2:
                base = base * base
            if POWER == -1:
                base = tl.div_rn(tl.full((B,), 1.0, tl.float32), base)
            score = tl.div_rn(score, base)
    infinite = tl.where(score == float("inf"), 1, tl.where(score == float("-inf"), 2, 0))
    broken = tl.max(tl.where(inside, tl.where(score != score, 3, infinite), 0), axis=0)
    if broken > 0:
        tl.atomic_max(status + 1 + index, broken)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    flat = first + at.to(tl.int64)
    position = start + flat
    least = tl.load(cut)
    enters = inside & ((key > least) | ((key == least) & (position < tl.load(cut + 1))))
    if tl.max(enters.to(tl.int32), axis=0) > 0:
        low = tl.zeros((B,), tl.int32)  # how many members come before the entry
        high = low + held
        for _ in range(steps):
            middle = (low + high) // 2
            before = tl.load(members + middle, mask=enters & (low < high), other=0) < flat
            low, high = tl.where((low < high) & before, middle + 1, low), tl.where((low < high) & ~before, middle, high)
        member = tl.load(members + low, mask=enters & (low < held), other=-1) == flat
        enters = enters & ~member
        number = enters.to(tl.int32)
        place = tl.atomic_add(status, tl.sum(number, axis=0)) + tl.cumsum(number, axis=0) - 1
        tl.store(keys + place, key, mask=enters)
        tl.store(positions + place, position, mask=enters)
        tl.store(payload + place, g, mask=enters)


def _cut_kernel(keys, positions, payload, status, cut, keep, limit, bits, B: tl.constexpr):  # type: ignore[no-untyped-def]
    count = tl.load(status)
    if count > limit:
        lane = tl.arange(0, B)
        # The largest integer that at least `keep` keys reach, by its bits. It is the key of the last entry that stays.
        least = tl.full((), -(1 << 31), tl.int64)
        for bit in range(32):
            candidate = least + (tl.full((), 1 << 31, tl.int64) >> bit)
            reached = tl.zeros((B,), tl.int32)
            for low in range(0, count, B):
                key = tl.load(keys + low + lane, mask=low + lane < count, other=-(1 << 31))
                reached += (key >= candidate).to(tl.int32)
            least = tl.where(tl.sum(reached, axis=0) >= keep, candidate, least)
        above, equal = tl.zeros((B,), tl.int32), tl.zeros((B,), tl.int32)
        final = tl.zeros((B,), tl.int64)
        for low in range(0, count, B):
            inside = low + lane < count
            key = tl.load(keys + low + lane, mask=inside, other=-(1 << 31))
            ties = inside & (key == least)
            above += (inside & (key > least)).to(tl.int32)
            equal += ties.to(tl.int32)
            final = tl.maximum(final, tl.load(positions + low + lane, mask=ties, other=0))
        room = keep - tl.sum(above, axis=0)
        last = tl.max(final, axis=0)
        if tl.sum(equal, axis=0) > room:  # Of those with this key, the first by position stay.
            last = tl.full((), 0, tl.int64)
            for bit in range(bits):
                candidate = last + (tl.full((), 1, tl.int64) << (bits - 1 - bit))
                before = tl.zeros((B,), tl.int32)
                for low in range(0, count, B):
                    inside = low + lane < count
                    ties = inside & (tl.load(keys + low + lane, mask=inside, other=0) == least)
                    position = tl.load(positions + low + lane, mask=ties, other=0)
                    before += (ties & (position < candidate)).to(tl.int32)
                last = tl.where(tl.sum(before, axis=0) < room, candidate, last)
        kept = tl.full((), 0, tl.int32)
        for low in range(0, count, B):  # An entry moves towards the front, never over one that was not read yet.
            inside = low + lane < count
            key = tl.load(keys + low + lane, mask=inside, other=0)
            position = tl.load(positions + low + lane, mask=inside, other=0)
            travels = tl.load(payload + low + lane, mask=inside, other=0.0)
            stays = inside & ((key > least) | ((key == least) & (position <= last)))
            number = stays.to(tl.int32)
            place = kept + tl.cumsum(number, axis=0) - 1
            tl.debug_barrier()  # All lanes have read before one of them writes.
            tl.store(keys + place, key, mask=stays)
            tl.store(positions + place, position, mask=stays)
            tl.store(payload + place, travels, mask=stays)
            kept += tl.sum(number, axis=0)
        tl.store(status, kept)
        tl.store(cut, least)
        tl.store(cut + 1, last)
