"""Tests the example of docs/lightning.md."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_tensors, assert_unselected_is_base, snapshot
from pages import run_page

import unmask

pytest.importorskip("lightning")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*num_workers.*"),
]


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return run_page("lightning.md")


def test_the_example_trains_its_budget_resumes_bitwise_and_its_delta_is_exact(page, tmp_path):
    tuned, resumed, base = page["tuned"], page["resumed"], page["network"]()
    assert (tuned.selection.used, tuned.selection.step) == (40, 12)
    assert_same_tensors(snapshot(tuned.model), snapshot(resumed.model))
    assert_same_tensors(snapshot(tuned.model), snapshot(page["fresh"]))
    assert_unselected_is_base(resumed.model, snapshot(base), resumed.selection)
    assert sum(int((p != q).sum()) for p, q in zip(base.parameters(), resumed.model.parameters(), strict=True)) == 40


def test_its_checkpoints_hold_no_weights(page, tmp_path):
    saved = torch.load(tmp_path / "checkpoints" / "step=9.ckpt", weights_only=False)
    assert saved["state_dict"] == {}
    assert saved["selection"]["values"].shape == (40,)
    assert saved["optimizer_states"][0]["state"][0]["exp_avg"].shape == (40,)


def test_an_optimizer_of_the_modules_own_parameters_is_refused(page):
    class Wrong(page["Selective"]):
        def configure_optimizers(self):
            super().configure_optimizers()
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    with pytest.raises(unmask.ScheduleNotRunError, match=r"selection\.parameters\(\)"):
        page["fit"](Wrong(page["network"](), budget=40))
