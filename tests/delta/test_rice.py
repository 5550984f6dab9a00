"""Checks the code of a tensor's indices: against a plain reading of its specification, the entropy, and damaged codes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from unmask.delta.rice import decode, encode
from unmask.reading import Malformed


def bits_of(code) -> str:
    """Returns a code's bits in their order, the least significant bit of each byte first."""
    return "".join(f"{byte:08b}"[::-1] for byte in code.tolist())


def plain_code(indices: list[int], numel: int, parameter: int) -> str:
    """Returns the bits of a code by its specification, one index after the other."""
    if 2 * len(indices) > numel:
        indices = sorted({*range(numel)} - {*indices})
    gaps = [after - before - 1 for before, after in zip([-1, *indices], indices, strict=False)]
    remainders = "".join(f"{gap % 2**parameter:0{parameter}b}"[::-1] for gap in gaps) if parameter else ""
    quotients = "".join("0" * (gap >> parameter) + "1" for gap in gaps)
    return "".join(part + "0" * (-len(part) % 8) for part in (remainders, quotients))


def sample(seed: int) -> tuple[np.ndarray, int]:
    """Returns indices of many densities, some of them in clusters, and the number of a tensor's entries."""
    rng = np.random.default_rng(seed)
    numel = int(2 ** rng.uniform(0, 12))
    p = rng.choice([0.001, 0.02, 0.3, 0.5, 0.7, 0.99, 0.0, 1.0])
    chosen = rng.random(numel) < p
    if seed % 3 == 0:
        chosen &= np.arange(numel) // 50 % 7 == 0
    return np.flatnonzero(chosen), numel


@pytest.mark.parametrize("part", range(4))
def test_the_code_is_the_specified_one_at_the_best_parameter_and_decodes(part):
    for seed in range(100 * part, 100 * part + 100):
        indices, numel = sample(seed)
        code, parameter = encode(indices, numel)
        assert bits_of(code) == plain_code(indices.tolist(), numel, parameter)
        assert decode(code, parameter, indices.size, numel).tolist() == indices.tolist()
        lengths = [len(plain_code(indices.tolist(), numel, other)) for other in range(14)]
        assert len(bits_of(code)) <= min(lengths) + 14  # Both parts are filled up to bytes.


@pytest.mark.parametrize(("p", "bits"), [(0.0005, 12.50), (0.002, 10.49), (0.01, 8.11)])
def test_random_indices_take_nearly_their_entropy(p, bits):
    indices = np.flatnonzero(np.random.default_rng(0).random(20_000_000) < p)
    code, _ = encode(indices, 20_000_000)
    entropy = (-p * math.log2(p) - (1 - p) * math.log2(1 - p)) / p
    assert entropy < 8 * code.size / indices.size == pytest.approx(bits, abs=0.02)


def test_all_indices_take_no_byte_and_half_of_them_a_bit_each():
    assert encode(np.arange(1000), 1000)[0].size == encode(np.arange(0), 1000)[0].size == 0
    assert encode(np.arange(500), 1000)[0].size == 63
    assert encode(np.arange(990), 1000)[0].size < 15  # The code lists the ten others.


@pytest.mark.parametrize("indices", [[0], [2**62], [2**63 - 2], [0, 2**63 - 2], [5, 2**40, 2**61, 2**62 + 1]])
def test_the_largest_tensors_can_be_coded(indices):
    code, parameter = encode(np.array(indices), 2**63 - 1)
    assert decode(code, parameter, len(indices), 2**63 - 1).tolist() == indices


def test_a_damaged_code_gives_ascending_indices_or_is_refused():
    draw, refused = random.Random(0), 0
    for seed in range(3000):
        indices, numel = sample(seed % 60)
        code, parameter = encode(indices, numel)
        damaged = np.frombuffer(code.tobytes() or b"\0", dtype=np.uint8).copy()
        damaged[draw.randrange(damaged.size)] ^= 1 << draw.randrange(8)
        damaged = damaged[: damaged.size - draw.choice((0, 0, 1))]
        parameter = draw.choice((parameter, parameter, 0, 1, 20, 56, 57, -1, 2**70))
        count, numel = (
            draw.choice((indices.size, indices.size + 1, -1)),
            draw.choice((numel, numel - 1, 2**63 - 1, 2**63)),
        )
        try:
            found = decode(damaged, parameter, count, numel)
        except Malformed:
            refused += 1
            continue
        assert found.shape == (count,)
        assert count == 0 or (found[0] >= 0 and found[-1] < numel and (np.diff(found) > 0).all())
    assert 1500 < refused < 3000
