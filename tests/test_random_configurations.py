"""Checks that a random configuration is refused by unmask, or keeps all promises: budget, other weights, delta, resuming."""

from __future__ import annotations

from collections import Counter

import pytest
from random_configurations import run_case


@pytest.mark.parametrize("block", range(8))
def test_every_random_configuration_is_refused_or_keeps_its_promises(block):
    outcomes = Counter(run_case(1_000 * block + number) for number in range(40))
    assert outcomes["kept"] >= 8
    assert outcomes["refused"] >= 4
