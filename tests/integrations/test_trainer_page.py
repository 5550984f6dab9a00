"""The examples of docs/trainer.md."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_tensors, snapshot
from pages import run_page

pytest.importorskip("trl")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_examples_train_resume_and_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = run_page("trainer.md")
    straight, resumed = page["callback"].selection, page["again"].selection
    assert (straight.used, straight.step, straight.dense_numel) == (100, 8, 34)
    assert_same_tensors(snapshot(straight.model), snapshot(resumed.model))
    assert page["selection"].used == 100
    assert len(straight.delta()) == 100
    assert (tmp_path / "delta.safetensors").stat().st_size > 0
    assert not list(tmp_path.rglob("model.safetensors"))
