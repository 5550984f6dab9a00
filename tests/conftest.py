from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before what reads it is imported

import pytest
import torch
from costs import forge_for_session
from helpers import trained

from unmask.methods import heuristics

_COSTS = forge_for_session()  # the choice of a product, and with it the last bits of a gradient, follows from them


def pytest_collection_finish():
    """What all the imports made is no garbage: no collection need look at it again, of which the tests ask for many."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


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
