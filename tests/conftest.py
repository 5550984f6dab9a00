from __future__ import annotations

import pytest
import torch

from helpers import trained
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


@pytest.fixture
def saved(tmp_path):
    """(base, path of a delta with sparse, dense and buffer tensors, its bytes)."""
    base, _, selection = trained(dense="head")
    path = selection.delta("some/base").save(tmp_path / "delta.safetensors")
    return base, path, path.read_bytes()
