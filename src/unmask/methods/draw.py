"""Draws positions and scores at random: to the same bit on every device and machine, and with every version of torch.

The generator is SplitMix64, used as a function of a counter. ``docs/methods.md`` specifies the draw to the bit, so that a program
in another language can repeat it. numpy is imported by the functions, so that a method is composed without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST = 1 << 40  # The largest number of positions to draw from.
_GAMMA = 0x9E3779B97F4A7C15
_PLACE = 24  # The bits that number the candidates which are made at a time. A position has the other 40 of 64 bits.
_PIECE = 1 << 16  # The outputs that are mixed at a time: few enough for a CPU's cache.


def draw(count: int, total: int, seed: int) -> NDArray[np.int64]:
    """Draws ``count`` distinct positions out of ``total``; every ordered choice is equally likely.

    So the numbers of positions that fall into the tensors of a model follow the multivariate hypergeometric distribution. Time
    and memory are of order ``count``, unless nearly all positions are drawn: all of them take time ``total * ln(total)``.

    Args:
        count: How many positions to draw: from 0 to ``total``.
        total: How many positions there are, numbered from 0; at most 2^40.
        seed: Any whole number. It counts modulo 2^64.

    Returns:
        (count,) the positions, in the order in which they were drawn.

    Raises:
        ValueError: There are not so many positions, or there are more than 2^40.

    Example:
        >>> draw(4, 10, seed=0).tolist()
        [6, 2, 4, 9]
    """
    import numpy as np

    if not 0 <= count <= total <= MOST:
        raise ValueError(f"count = {count}, total = {total}; they must be 0 <= count <= total <= 2^40.")
    bits = max(1, (total - 1).bit_length())
    key, counter = _key(seed), 1
    drawn = np.empty(0, dtype=np.int64)
    while (missing := count - drawn.size) > 0:
        # The share of the candidates that are positions and new tells how many candidates bring what is missing.
        fresh = (total - drawn.size) / (1 << bits)
        size = min(1 << _PLACE, int(1.05 * missing / fresh) + 64)
        candidates = _outputs(key, counter, size) >> np.uint64(64 - bits)
        counter += size
        places = np.flatnonzero(candidates < total).astype(np.uint64)
        # One number holds a candidate's position and place. So a single sort orders by position, and then by place.
        packed = np.sort((candidates[places] << np.uint64(_PLACE)) | places)
        positions = (packed >> np.uint64(_PLACE)).astype(np.int64)
        first = np.ones(positions.size, dtype=bool)
        np.not_equal(positions[1:], positions[:-1], out=first[1:])
        if drawn.size:
            known = np.sort(drawn)
            first &= known[np.searchsorted(known, positions).clip(max=known.size - 1)] != positions
        new = np.zeros(size, dtype=bool)
        new[(packed[first] & np.uint64((1 << _PLACE) - 1)).astype(np.int64)] = True
        drawn = np.concatenate([drawn, candidates[new][:missing].astype(np.int64)])
    return drawn


def uniform(count: int, first: int, *seeds: int) -> NDArray[np.float32]:
    """Returns random numbers in [0, 1), multiples of 2^-24, for the positions ``first`` to ``first + count - 1``: (count,).

    The seeds are whole numbers. The number of a position does not depend on where a block begins.

    Example:
        >>> uniform(4, 0, 7)[2:].tolist() == uniform(2, 2, 7).tolist()
        True
    """
    import numpy as np

    return (_outputs(_key(*seeds), first + 1, count) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _key(*seeds: int) -> int:
    """Returns a 64-bit key; of one seed it is SplitMix64's first output."""
    import numpy as np

    key = np.zeros(1, dtype=np.uint64)
    for seed in seeds:
        key = _mixed(key + np.uint64((seed + _GAMMA) % (1 << 64)))
    return int(key[0])


def _outputs(key: int, first: int, count: int) -> NDArray[np.uint64]:
    """Returns SplitMix64's outputs number ``first`` to ``first + count - 1``, counted from 1, of the state ``key``: (count,)."""
    import numpy as np

    out = np.empty(count, dtype=np.uint64)
    for low in range(0, count, _PIECE):
        piece = out[low : low + _PIECE]
        np.multiply(np.arange(piece.size, dtype=np.uint64), np.uint64(_GAMMA), out=piece)
        piece += np.uint64((key + (first + low) * _GAMMA) % (1 << 64))
        _mixed(piece)
    return out


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes 64-bit numbers in place by SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014), and returns them."""
    import numpy as np

    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z
