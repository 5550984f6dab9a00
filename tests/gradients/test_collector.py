"""Puts the gradients of entries of several tensors together, by autograd."""

from __future__ import annotations

import torch

from unmask.gradients.collector import Collector, entries_at
from unmask.gradients.entries import Entries


def entries(shape, flat, slots):
    return Entries(shape, torch.tensor(flat), torch.tensor(slots))


def collected(tensors, wanted, loss_of):
    """Returns what arrived at each backward of two."""
    arrived = []
    collector = Collector(wanted, tensors, lambda slots, gradient: arrived.append((slots.tolist(), gradient.tolist())))
    for factor in (1, 2):
        (factor * loss_of(collector.parts)).backward()
    return arrived


def test_one_vector_holds_the_gradients_of_all_tensors_and_uses():
    wanted = {0: entries((1, 3), [1], [2]), 2: entries((2, 2), [0, 3], [1, 0])}
    tensors = [torch.ones(3), torch.ones(1), torch.ones(2, 2)]
    found = collected(
        tensors,
        wanted,
        lambda parts: (
            (3 * parts[0].proxy + parts[2].proxy * parts[2].proxy.new_tensor([5, 7])).sum() + parts[0].proxy.sum()
        ),
    )
    assert found == [([2, 1, 0], [7, 5, 7]), ([2, 1, 0], [14, 10, 14])]


def test_a_tensor_that_the_loss_does_not_reach_has_zeros():
    wanted = {0: entries((1, 3), [1], [0]), 1: entries((1, 3), [2], [1])}
    assert collected([torch.ones(3)] * 2, wanted, lambda parts: parts[1].proxy.sum())[0] == ([0, 1], [0, 1])


def test_float64_tensors_have_a_vector_of_that_dtype():
    wanted = {0: entries((1, 3), [1], [0]), 1: entries((1, 3), [2], [1])}
    tensors = [torch.ones(3), torch.ones(3, dtype=torch.float64)]
    collector = Collector(wanted, tensors, lambda slots, gradient: None)
    assert [collector.parts[i].proxy.dtype for i in (0, 1)] == [torch.float32, torch.float64]


def test_an_operator_finds_collected_entries_by_their_indices():
    wanted = {0: entries((2, 3), [1, 4], [0, 1])}
    kept = Collector(wanted, [torch.ones(2, 3)], lambda slots, gradient: None)
    assert entries_at(wanted[0].flat, 2, 3) is kept.entries[0]
    assert entries_at(wanted[0].flat, 3, 2).shape == (3, 2)
    assert entries_at(wanted[0].flat.clone(), 2, 3) is not wanted[0]
