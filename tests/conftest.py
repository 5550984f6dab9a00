from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries that read it are imported

import pytest
import torch
from costs import forge_for_session
from helpers import trained

from unmask.methods import heuristics

_COSTS = forge_for_session()  # the choice of a product, and with it the last bits of a gradient, follows from them


def pytest_collection_finish():
    """Freezes the objects that the imports made, so that the many collections of the tests need not look at them again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _freeze():
    """Freezes what a file of tests has left, such as the modules of a compiler, which later collections would read again."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def registry():
    """Returns the registry of heuristics, and puts it back as it was after the test."""
    before = dict(heuristics._REGISTRY)
    yield heuristics._REGISTRY
    heuristics._REGISTRY.clear()
    heuristics._REGISTRY.update(before)


@pytest.fixture
def saved(tmp_path):
    """Returns (the base, the path of a delta with sparse, dense and buffer tensors, the bytes of that file)."""
    base, _, selection = trained(dense="head")
    path = selection.delta("some/base").save(tmp_path / "delta.safetensors")
    return base, path, path.read_bytes()
