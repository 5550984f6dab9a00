"""Keeps the k best of many entries in a buffer on a GPU, by two Triton kernels; the host does not wait for the device.

Entries are ordered by score, descending, and then by position, ascending. The *cut-off* is the score and the position that an
entry must come before to enter the buffer; it lives on the device and begins at the floor. The first kernel scores a block of
entries and appends those before the cut-off, at places that an atomic counter gives out. The second kernel does nothing while
the buffer has room for the next blocks. Otherwise it cuts the buffer back to its k best entries, and the last of them becomes
the cut-off. So an entry that is not in the buffer always comes after k entries that are.

The host counts the entries that it has offered since it last launched the second kernel, and launches it before they could be
more than fit. So the buffer cannot overflow, and no gradient is needed twice. At first it launches the second kernel each time
that the number of entries offered has doubled: the cut-off then rises before many entries have entered, and the one program of
that kernel has little to read. The atomic counter gives out places in any order,
but a position occurs once, so score and position alone decide which entries stay.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from unmask.gradients import triton_sampled
from unmask.ranking.topk import Ranked, in_order
from unmask.ranking.triton_kernels import kernels

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
        power: The power of D3: -1, 1 or 2. These take only products and divisions, which are rounded as IEEE 754 says.
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
        full: The largest number of entries that the second kernel leaves in the buffer, and that of the first blocks.
        room: The largest number of entries that may be offered between two launches of the second kernel.
        total: The number of entries that may be offered in all; their positions are below it.
    """

    keep: int
    full: int
    room: int
    total: int

    @property
    def limit(self) -> int:
        """The number of entries above which the second kernel cuts the buffer back to k."""
        return max(2 * self.keep, self.full // 4)

    @property
    def capacity(self) -> int:
        """The entries that fit into the buffer."""
        return min(self.full + self.room, self.total)

    @classmethod
    def of(cls, keep: int, total: int) -> Sizes:
        """Returns the sizes for the k best of ``total`` entries.

        A buffer takes 32 bytes for each of the k best, and at most half a byte for each entry offered, or 2 MiB.

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
    tiny = torch.tensor([1.0, 3.0, 2.0], device=device) * 2.0**-130
    try:
        buffer = BestBuffer(Sizes.of(2, 3), -torch.inf, 1, device)
        buffer.offer(0, 0, 0, tiny, torch.zeros_like(tiny), None, Formula("d3", power=2))
        buffer.cut_back()
        if buffer.ranked(int(buffer.status[0].item())).positions.tolist() != [1, 2]:
            raise RuntimeError("scores below the smallest normal number are lost, as by Triton 3.0")
    except Exception as error:  # An old device, a driver or a missing compiler shows here, and not in training.
        warnings.warn(f"Triton does not rank on {device}, plain torch is used instead: {error}", stacklevel=2)
        return False
    return True


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
        # Scores are kept as keys: integers of the same order.
        self._keys = torch.empty(sizes.capacity, dtype=torch.int32, device=device)
        self._positions = torch.empty(sizes.capacity, dtype=torch.int64, device=device)
        self._payload = torch.empty(sizes.capacity, dtype=torch.float32, device=device)
        # The cut-off's key and position. A tensor made of a list would be copied to the device, and the host would wait.
        self._cut = torch.zeros(2, dtype=torch.int64, device=device)
        self._cut[:1].fill_(_key(floor))
        self._offered = self._before = 0  # entries, since the second kernel was last launched and before

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
        if self._offered + size > min(self.sizes.room, max(self.sizes.full, self._before)):
            self._launch_cut(self.sizes.limit)
        self._offered += size
        held = 0 if members is None else members.numel()
        append, _ = kernels()
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
        _, cut = kernels()
        with torch.cuda.device_of(self._keys):
            cut[(1,)](
                self._keys, self._positions, self._payload, self.status, self._cut,
                self.sizes.keep, limit, self.sizes.total.bit_length(), B=_READ, num_warps=16, **_OPTIONS,
            )  # fmt: skip
        self._before, self._offered = self._before + self._offered, 0

    def ranked(self, count: int) -> Ranked:
        """Returns the first k entries of the buffer, of which the host knows by now that it holds ``count``."""
        keys = self._keys[:count]
        scores = (keys ^ ((keys >> 31) & _SIGN)).view(torch.float32)
        return in_order(Ranked(scores, self._positions[:count], self._payload[:count])).first(self.sizes.keep)


def _key(score: float) -> int:
    """Returns the integer of a float32 score that the kernel computes, too: the larger the score, the larger the integer."""
    bits: int = struct.unpack("<i", struct.pack("<f", score))[0]
    return bits ^ ((bits >> 31) & _SIGN)
