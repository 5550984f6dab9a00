"""Tests that a selection on a model that FSDP2 has sharded is that on the unsharded model."""

from __future__ import annotations

import distributed_runs as runs
import processes
import pytest
import torch

import unmask
from unmask import SparseDelta


def assert_same(sharded: dict, alone: dict, tolerance: dict | None = None) -> None:
    assert sharded["positions"].equal(alone["positions"])
    torch.testing.assert_close(sharded["values"], alone["values"], **(tolerance or {}))


@pytest.mark.parametrize("count", [2, 3])
def test_all_methods_select_as_unsharded(count, tmp_path):
    """Of three processes, the last one holds fewer rows, and of some tensors none."""
    cases = [{"method": name} for name in runs.FSDP_METHODS]
    cases += [{"method": "id3", "gradients": "dense"}, {"method": "id3", "accumulation": "exact"}]
    together = processes.run(count, tmp_path, runs.fsdp_grid, cases)
    for i, case in enumerate(cases):
        first, others = together[0][i], [results[i] for results in together[1:]]
        for other in others:
            assert other["values"].equal(first["values"]), case
            assert other["base"] == first["base"]
        assert first["held"] < 1 / count + 0.1  # each process holds its share of the weights only
        if count == 2:  # eight rows divide into two equal parts
            alone = runs.fsdp(**case)
            assert_same(first, alone)
            assert first["base"] == alone["base"]  # the fingerprint of the base model
            for name, values in alone["delta"].items():
                torch.testing.assert_close(first["delta"][name], values)


def test_the_delta_gives_an_unsharded_model_the_trained_weights(tmp_path):
    for result in processes.run(2, tmp_path, runs.fsdp_full, str(tmp_path)):
        model = runs.blocks()
        SparseDelta.load(tmp_path / "delta.safetensors").apply(model)
        for name, tensor in model.state_dict().items():
            assert tensor.equal(result[name]), name


def test_a_run_goes_on_sharded_or_not(tmp_path):
    straight = runs.fsdp("id3_strided")
    resumed = processes.run(2, tmp_path / "sharded", runs.fsdp, "id3_strided", torch.float32, 3)
    assert_same(resumed[0], straight)
    state = processes.run(2, tmp_path / "first", runs.fsdp, "id3_strided", torch.float32, None, 3)[1]["state"]
    selection = unmask.select(runs.blocks(), runs.FSDP_METHODS["id3_strided"]())
    selection.load_state_dict(state)
    assert selection.used == 32
    others = processes.run(3, tmp_path / "more", runs.fsdp_loaded, state)
    assert all(step == 3 and torch.equal(values, state["values"]) for step, values in others)


@pytest.mark.parametrize("case", ["bfloat16", "mixed", "checkpointed", "accumulated"])
def test_precision_checkpointing_and_accumulation(case, tmp_path):
    alone = runs.fsdp_variant(case)
    first, second = processes.run(2, tmp_path, runs.fsdp_variant, case)
    assert first["values"].equal(second["values"])
    if case in ("checkpointed", "accumulated"):
        assert_same(first, alone)
    else:  # gradients of half the rows are rounded to bfloat16 before they are summed
        shared = set(first["positions"].tolist()) & set(alone["positions"].tolist())
        assert len(shared) >= 0.8 * len(alone["positions"])


def test_what_is_not_finite_in_one_process_is_refused_by_all(tmp_path):
    assert processes.run(2, tmp_path, runs.fsdp_nonfinite) == [["refused", "step 1", "refused", "step 2"]] * 2


def test_a_head_may_stay_whole_outside_the_sharding(tmp_path):
    alone = runs.fsdp_head()
    for sharded in processes.run(2, tmp_path, runs.fsdp_head):
        assert sharded[0].equal(alone[0])
        torch.testing.assert_close(sharded[1], alone[1])
        torch.testing.assert_close(sharded[2], alone[2])


def test_what_a_sharded_model_does_not_allow_is_refused_with_the_way_round(tmp_path):
    for said in processes.run(2, tmp_path, runs.fsdp_refused):
        assert "needs exchange='exact'" in said["candidates"]
        assert "ignored_params" in said["dense"]
        assert "allocation='global'" in said["rows"]
        assert "use leaving='restored'" in said["kept"]
        assert "without calibration" in said["fisher"]
        assert "leave such tensors out with exclude=" in said["mixed"]
        assert "no HSDP, no tensor parallelism" in said["tensor parallel"]
        assert "was replaced after unmask.select() (by a new layer" in said["sharded after"]
        assert "holds the model's frozen parameters" in said["optimizer"]
