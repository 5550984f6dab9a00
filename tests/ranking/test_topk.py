"""Compares the streaming top-k with a plain sort."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from unmask.ranking.topk import Ranked, StreamingTopK


def plain_sort(scores: torch.Tensor, k: int) -> list[int]:
    """Returns the first k positions by score descending, then position ascending; -inf never enters."""
    ranked = sorted((-score, position) for position, score in enumerate(scores.tolist()) if score != -float("inf"))
    return [position for _, position in ranked[:k]]


def stream(scores: torch.Tensor, cuts: list[int], k: int, shuffle: random.Random) -> StreamingTopK:
    edges = [0, *sorted(cuts), scores.numel()]
    blocks = [(low, scores[low:high]) for low, high in itertools.pairwise(edges)]
    shuffle.shuffle(blocks)
    top = StreamingTopK(k)
    for low, block in blocks:
        top.update(block, low, torch.arange(low, low + block.numel()).double())
    return top


@pytest.mark.parametrize("distinct", [1, 2, 7, 1000])
@pytest.mark.parametrize("k", [0, 1, 5, 33, 100, 150])
def test_equals_a_plain_sort_for_any_cut_and_order_of_blocks(k, distinct):
    shuffle = random.Random(k * 1000 + distinct)
    for _ in range(25):
        scores = torch.tensor([shuffle.randrange(distinct) / 8 for _ in range(100)])
        scores[torch.tensor([shuffle.random() < 0.1 for _ in range(100)])] = -torch.inf
        cuts = [shuffle.randrange(101) for _ in range(shuffle.randrange(12))]
        result = stream(scores, cuts, k, shuffle).result()
        assert result.positions.tolist() == plain_sort(scores, k)
        assert torch.equal(result.scores, scores[result.positions])
        assert torch.equal(result.payload, result.positions.to(result.payload.dtype))


def test_many_blocks_of_one_entry_keep_the_buffer_small():
    scores = torch.arange(500.0)
    top, largest = StreamingTopK(4), 0
    for position in range(500):
        top.update(scores[position : position + 1], position, scores[position : position + 1])
        largest = max(largest, top._size)
    assert top.result().positions.tolist() == [499, 498, 497, 496]
    assert largest <= 3 * 4 + 1


def test_a_tie_across_blocks_goes_to_the_smaller_position_in_any_order_of_the_blocks():
    late_first = StreamingTopK(1)
    late_first.update(torch.ones(3), 10, torch.ones(3))
    late_first.update(torch.ones(3), 0, torch.zeros(3))
    assert late_first.result().positions.tolist() == [0]
    assert late_first.result().payload.tolist() == [0.0]


def test_merging_streams_equals_one_stream():
    scores = torch.randint(0, 5, (90,)).double()
    parts = []
    for low in range(0, 90, 30):
        part = StreamingTopK(11)
        part.update(scores[low : low + 30], low, scores[low : low + 30])
        parts.append(part.result())
    merged = StreamingTopK(11)
    for part in reversed(parts):
        merged.merge(part)
    assert merged.result().positions.tolist() == plain_sort(scores, 11)


def test_a_tie_that_is_merged_later_still_goes_to_the_smaller_position():
    shuffle = random.Random(0)
    for k in (1, 3, 10, 25):
        scores = torch.tensor([shuffle.randrange(3) for _ in range(60)]).double()
        merged = StreamingTopK(k)
        places = list(range(60))
        shuffle.shuffle(places)
        for low in range(0, 60, 12):
            at = torch.tensor(places[low : low + 12])
            merged.merge(Ranked(scores[at], at, scores[at]))
        assert merged.result().positions.tolist() == plain_sort(scores, k)


def test_nothing_offered_gives_nothing():
    top = StreamingTopK(3)
    top.merge(StreamingTopK(3).result())
    top.update(torch.full((4,), -torch.inf), 0, torch.zeros(4))
    assert [column.tolist() for column in top.result()] == [[], [], []]


def test_k_zero_accepts_a_merge():
    top = StreamingTopK(0)
    top.merge(Ranked(torch.ones(2), torch.tensor([0, 1]), torch.ones(2)))
    assert top.result().positions.tolist() == []


def test_an_empty_merge_does_not_move_the_result_to_another_dtype():
    top = StreamingTopK(2)
    top.merge(StreamingTopK(2).result())
    top.update(torch.tensor([1.0, 2.0], dtype=torch.float64), 0, torch.zeros(2))
    assert top.result().scores.dtype == torch.float64
