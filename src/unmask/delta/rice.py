"""Codes ascending indices in few bits: Golomb-Rice coding of the gaps between them, with one parameter for a tensor.

``docs/delta.md`` specifies the code to the bit, so that a program in another language can read it. The remainders of all gaps
come first and the quotients follow, so that numpy codes and decodes whole arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unmask.reading import Malformed

_MOST_BITS = 56  # The largest parameter: a remainder and its shift by up to seven bits fit into 63 bits.


def encode(indices: NDArray[np.int64], numel: int) -> tuple[NDArray[np.uint8], int]:
    """Codes the indices of some entries of a tensor.

    At a density p of at most 1/2, indices at random take nearly the entropy, ``-log2(p) - (1 - p) / p * log2(1 - p)`` bits each:
    10.49 bits at p = 0.002, where the entropy is 10.41. Above 1/2 the other indices are coded, so all indices take no byte.

    Args:
        indices: (n,) int64, strictly ascending, from 0 to ``numel - 1``.
        numel: The number of entries of the tensor.

    Returns:
        The code, (bytes,) uint8, and the Rice parameter, which makes it shortest. `decode` needs both, and n and ``numel``.

    Example:
        >>> code, parameter = encode(np.array([2, 9, 11]), numel=20)
        >>> code.tolist(), parameter
        ([4, 98], 1)
        >>> decode(code, parameter, 3, 20).tolist()
        [2, 9, 11]
    """
    listed = indices if 2 * indices.size <= numel else _others(indices, numel)
    if not listed.size:
        return np.empty(0, dtype=np.uint8), 0
    gaps = np.diff(listed, prepend=-1) - 1
    # Outside this range a step towards it adds fewer quotient bits than it saves remainder bits, or the reverse.
    high = min(_MOST_BITS, ((int(listed[-1]) + 1) // listed.size).bit_length())
    parameter = min(range(max(0, high - 2), high + 1), key=lambda k: k * gaps.size + int((gaps >> k).sum()))
    ends = np.cumsum((gaps >> parameter) + 1) - 1
    quotients = np.zeros(int(ends[-1]) + 1, dtype=np.uint8)
    quotients[ends] = 1
    return np.concatenate([_pack(gaps, parameter), np.packbits(quotients, bitorder="little")]), parameter


def decode(code: NDArray[np.uint8], parameter: int, count: int, numel: int) -> NDArray[np.int64]:
    """Returns the indices that `encode` coded: (count,) int64.

    It takes memory of order ``count`` and of the code's length. ``count`` must be known to be no lie, by the number of values.

    Raises:
        Malformed: The code is none of ``count`` ascending indices below ``numel``.

    Example:
        >>> decode(np.array([4, 99], dtype=np.uint8), 1, 3, 20)
        Traceback (most recent call last):
        unmask.reading.Malformed: its code of 3 indices below 20 is damaged
    """
    damaged = Malformed(f"its code of {count} indices below {numel} is damaged")
    if not (0 <= count <= numel < 2**63 and 0 <= parameter <= _MOST_BITS):
        raise damaged
    inverse = 2 * count > numel
    size = numel - count if inverse else count
    remainders = -(-size * parameter // 8)
    if code.size < remainders:
        raise damaged
    ends = np.flatnonzero(np.unpackbits(code[remainders:], bitorder="little"))
    if ends.size != size or code.size - remainders != (int(ends[-1]) // 8 + 1 if size else 0):
        raise damaged
    quotients = np.diff(ends, prepend=-1) - 1
    if size and int(quotients.max()) > numel >> parameter:
        raise damaged
    indices = np.cumsum((quotients << parameter | _unpack(code[:remainders], parameter, size)) + 1) - 1
    if size and not (int(indices.min()) >= 0 and int(indices.max()) < numel):  # A sum above 63 bits becomes negative.
        raise damaged
    return _others(indices, numel) if inverse else indices


def _others(indices: NDArray[np.int64], numel: int) -> NDArray[np.int64]:
    """Returns the indices of a tensor's other entries, ascending."""
    other = np.ones(numel, dtype=bool)
    other[indices] = False
    return np.flatnonzero(other)


def _pack(numbers: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Writes the low ``bits`` bits of each number one after the other, the least significant bit first.

    Eight numbers fill ``bits`` bytes, so every eighth number begins at the same bit of its byte.
    """
    groups = np.zeros((-(-numbers.size // 8), 8), dtype=np.int64)
    groups.reshape(-1)[: numbers.size] = numbers & ((1 << bits) - 1)
    packed = np.zeros((len(groups), bits), dtype=np.uint8)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        shifted = groups[:, place] << shift
        for byte in range(-(-(shift + bits) // 8) if bits else 0):
            packed[:, first + byte] |= (shifted >> (8 * byte)).astype(np.uint8)
    return packed.reshape(-1)[: -(-numbers.size * bits // 8)]


def _unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Reads ``count`` numbers that `_pack` wrote."""
    groups = np.zeros((-(-count // 8), bits), dtype=np.uint8)
    groups.reshape(-1)[: packed.size] = packed
    numbers = np.zeros((len(groups), 8), dtype=np.int64)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        for byte in range(-(-(shift + bits) // 8) if bits else 0):
            numbers[:, place] |= groups[:, first + byte].astype(np.int64) << (8 * byte)
        numbers[:, place] >>= shift
    return numbers.reshape(-1)[:count] & ((1 << bits) - 1)
