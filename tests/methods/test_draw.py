"""The draw of a random mask: its specification read again in plain integers, its distribution, and what it costs."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, multivariate_hypergeom
from torch import nn

import unmask
from unmask.methods import draw as drawing
from unmask.methods.draw import draw, uniform

WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def draw_by_the_page(count: int, total: int, seed: int) -> list[int]:
    """Follows docs/methods.md word by word, in Python's integers."""
    key, bits = mix((seed + GAMMA) & WORD), max(1, len(f"{total - 1:b}"))
    positions: dict[int, None] = {}
    for i in itertools.count(1):
        if len(positions) == count:
            return list(positions)
        candidate = mix((key + i * GAMMA) & WORD) >> (64 - bits)
        if candidate < total:
            positions.setdefault(candidate)
    raise AssertionError


def test_the_generator_gives_the_published_outputs_of_splitmix64():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert drawing._outputs(1234567, 1, 5).tolist() == published


@pytest.mark.parametrize(
    ("count", "total", "seed"),
    [
        (0, 0, 0),
        (1, 1, 5),
        (2, 2, 1),
        (4, 10, 0),
        (1000, 1000, 9),  # all of them
        (300, 1000, -7),
        (500, 512, 3),  # a power of two
        (70, 513, 2**70 + 1),  # one more than a power of two
        (2000, 6_738_415_616, 11),
        (2000, 1 << 40, 11),
        (70_000, 140_000, 4),  # more candidates than are mixed at a time
    ],
)
def test_the_draw_is_that_of_the_page(count, total, seed):
    drawn = draw(count, total, seed)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == draw_by_the_page(count, total, seed)


def test_pieces_do_not_change_the_draw(monkeypatch):
    expected = draw(3000, 5000, 2).tolist()
    monkeypatch.setattr(drawing, "_PIECE", 7)
    monkeypatch.setattr(drawing, "_PLACE", 8)
    assert draw(3000, 5000, 2).tolist() == expected


def test_every_ordered_choice_is_equally_likely():
    """All 60 ordered choices of 3 of 5 positions, over 12,000 seeds."""
    seen = Counter(tuple(draw(3, 5, seed).tolist()) for seed in range(12_000))
    assert set(seen) == set(itertools.permutations(range(5), 3))
    assert chisquare(list(seen.values())).pvalue > 1e-3


def test_the_counts_of_tensors_follow_the_multivariate_hypergeometric_distribution():
    sizes, count = [3, 5, 12], 4
    edges = np.cumsum([0, *sizes])
    found = Counter(tuple(np.histogram(draw(count, sum(sizes), seed), bins=edges)[0].tolist()) for seed in range(8_000))
    cases = [(a, b, count - a - b) for a in range(4) for b in range(count - a + 1)]
    expected = [8_000 * multivariate_hypergeom.pmf(case, m=sizes, n=count) for case in cases]
    assert set(found) <= set(cases)
    assert chisquare([found[case] for case in cases], expected).pvalue > 1e-3


def test_memory_is_of_the_order_of_what_is_drawn():
    draw(10, 100, 0)
    tracemalloc.start()
    draw(100_000, 6_738_415_616, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 100_000  # 100 bytes a position; one bit for each of the 6.7e9 weights would be 842 MB


@pytest.mark.parametrize(("count", "total"), [(-1, 4), (5, 4), (1, (1 << 40) + 1)])
def test_a_draw_that_cannot_be_is_refused(count, total):
    with pytest.raises(ValueError, match=f"count = {count}, total = {total}; they must be"):
        draw(count, total, 0)


def test_scores_of_a_block_are_those_of_the_whole():
    whole = uniform(1000, 0, 3, 1, 4)
    assert np.array_equal(uniform(100, 500, 3, 1, 4), whole[500:600])
    key = mix((mix((mix((3 + GAMMA) & WORD) + 1 + GAMMA) & WORD) + 4 + GAMMA) & WORD)
    assert whole[7] == (mix((key + 8 * GAMMA) & WORD) >> 40) / 2**24
    assert whole.min() >= 0
    assert whole.max() < 1
    assert abs(whole.mean() - 0.5) < 0.03


def test_a_random_mask_holds_the_positions_drawn():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5))
    selection = unmask.select(model, unmask.random_mask(50, seed=8))
    assert selection.ledger.positions.tolist() == draw_by_the_page(50, 30 * 20 + 20 + 20 * 5 + 5, 8)


@pytest.mark.parametrize("allocation", ["tensor", "row", "column"])
def test_a_random_mask_that_is_spread_holds_the_best_scores_of_each_group(allocation):
    model = nn.Sequential(nn.Linear(10, 8, bias=False), nn.Linear(8, 10, bias=False))
    selection = unmask.select(model, unmask.random_mask(16, seed=8).but(allocation=allocation))
    scores = torch.cat([torch.from_numpy(uniform(80, 0, 8, 0, index)) for index in range(2)])
    chosen = torch.zeros(160, dtype=torch.bool)
    chosen[selection.ledger.positions] = True
    assert chosen.sum() == 16
    shapes = {"tensor": [(1, 80), (1, 80)], "row": [(8, 10), (10, 8)], "column": [(8, 10), (10, 8)]}[allocation]
    for low, shape in zip((0, 80), shapes, strict=True):
        mask, score = (part[low : low + 80].view(shape) for part in (chosen, scores))
        if allocation == "column":
            mask, score = mask.t(), score.t()
        assert mask.sum(1).max() <= -(-16 * mask.shape[1] // 160)
        for held, own in zip(mask, score, strict=True):  # a group's best come first
            assert not held.any() or own[held].min() > own[~held].max()


@pytest.mark.parametrize("seed", [0.5, -1.25])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(unmask.MethodError, match=rf"seed = {seed}; a seed must be a whole number"):
        unmask.random_mask(10, seed=seed)
