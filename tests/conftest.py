from __future__ import annotations

import pytest
import torch

from unmask import heuristics


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def registry():
    """The heuristics' registry, put back as it was after the test."""
    before = dict(heuristics._REGISTRY)
    yield heuristics._REGISTRY
    heuristics._REGISTRY.clear()
    heuristics._REGISTRY.update(before)
