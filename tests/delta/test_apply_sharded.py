"""Checks that a delta is applied to, swapped on and taken off a model that FSDP2 has sharded, as it is on a whole model."""

from __future__ import annotations

import delta_runs as runs
import processes
import pytest
import torch
from helpers import assert_same_tensors


@pytest.mark.parametrize(
    ("count", "dtype", "options"),
    [(2, torch.float32, {}), (2, torch.bfloat16, {"new": "head"}), (3, torch.float32, {"new": "embed|head"})],
    ids=["two", "two, in bfloat16 with a new head", "three, with a new embedding"],
)
def test_every_step_gives_the_weights_of_a_whole_model(count, dtype, options, tmp_path):
    alone = runs.swapped(dtype, options)
    for result in processes.run(count, tmp_path, runs.swapped, dtype, options):
        for step, expected in zip(result["steps"], alone["steps"], strict=True):
            assert_same_tensors(step, expected)
        for delta, expected in zip(result["deltas"], alone["deltas"], strict=True):
            assert (delta.places, delta.base) == (expected.places, expected.base)
            assert_same_tensors(dict(delta.whole), dict(expected.whole))
            held, wanted = ({n: e.values for n, e in d.sparse.items()} for d in (delta, expected))
            assert_same_tensors(held, wanted)


def test_all_processes_refuse_and_all_are_as_they_were(tmp_path):
    one, two = processes.run(2, tmp_path, runs.refused)
    assert "not the delta's base" in one[0]
    assert one[0] == two[0]
    assert "process 1 failed in writing a delta" in one[1]
    assert "could not be written: out of memory" in two[1]


def test_another_sharding_is_refused(tmp_path):
    for said in processes.run(2, tmp_path, runs.columns):
        assert "no delta can be applied" in said
        assert "no HSDP, no tensor parallelism" in said
