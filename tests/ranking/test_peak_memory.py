"""The memory of a selecting step: the dense gradients are freed tensor by tensor, and the ranking takes little."""

from __future__ import annotations

import pytest
from memory import peaks

import unmask
from unmask.gradients.backend import portable
from unmask.ranking import unwaiting

METHODS = [
    unmask.id3(500, 10),
    unmask.id3(500, 10, exp=0.0),
    unmask.id3(500, 10).but(heuristic=unmask.heuristic("snip")),
    unmask.repeat_d3(500),
    unmask.static_d3(500),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}, {method.heuristic.name}")
@pytest.mark.parametrize(("depth", "width"), [(24, 256), (40, 200)])
def test_a_selecting_step_takes_the_memory_of_a_frozen_backward_and_a_gradient(method, depth, width):
    with portable():
        frozen, selecting, gradient = peaks(method, depth, width, 1024)
    assert gradient * depth > 0.15 * frozen  # all gradients together would not go unseen
    assert selecting <= 1.08 * frozen + gradient


def test_the_measure_sees_gradients_that_are_kept(monkeypatch):
    monkeypatch.setattr(unwaiting, "_LEAST", unwaiting._SMALL)
    with portable():
        frozen, selecting, gradient = peaks(METHODS[0], 24, 256, 1024)
    assert selecting > 1.08 * frozen + gradient
