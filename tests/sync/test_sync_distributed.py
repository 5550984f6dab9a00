"""Checks the transport by broadcasts between processes, over gloo, and models that FSDP2 has sharded."""

from __future__ import annotations

import processes
import pytest
import sync_processes as runs
import torch
from helpers import assert_same_tensors

from unmask import SyncError
from unmask.sync import Distributed


@pytest.mark.parametrize("count", [2, 3])
def test_receivers_hold_the_trainers_tensors_after_every_step(count, tmp_path):
    found = processes.run(count, tmp_path, runs.follow_all)
    for method in runs.METHODS:
        trainer = found[0][method]
        assert [version for version, _ in trainer] == [1, 2, 3, 4, 5]
        for results in found[1:]:
            for (version, held), (sent, tensors) in zip(results[method], trainer, strict=True):
                assert version == sent
                assert_same_tensors(held, tensors)
        assert not torch.equal(trainer[0][1]["embed.weight"], trainer[-1][1]["embed.weight"]) or method != "pafi"


def test_two_trainers_and_a_group_of_one_of_them_and_a_receiver(tmp_path):
    first, second, held = processes.run(3, tmp_path, runs.in_a_group)
    for one, other, received in zip(first, second, held, strict=True):
        assert_same_tensors(one, other)
        assert_same_tensors(other, received)


def test_a_trainer_that_is_late_or_lost(tmp_path):
    _, late = _survivor(tmp_path / "late", runs.late)
    assert late.startswith("True 1 the exchange with the other processes of the group failed")
    _, lost = _survivor(tmp_path / "lost", runs.lost)
    assert lost.startswith("1 the exchange with the other processes of the group failed")


def _survivor(folder, function):
    """Returns (nothing, the result of process 1); process 0 ends by itself."""
    processes.run(2, folder, function, dies=True)
    return None, torch.load(folder / "1.result", weights_only=False)


def test_misuse_is_refused(tmp_path):
    zero, one = processes.run(2, tmp_path, runs.misuse)
    assert "process 0 publishes (src=), so it cannot receive" in zero[0]
    assert "in a group of the processes [0]" in zero[1]
    assert "process 1 cannot publish: the group's publisher is process 0" in one[0]
    assert "messages of process 7" in one[1]
    with pytest.raises(SyncError, match="no process group yet"):
        Distributed()


def test_a_sharded_model_is_followed(tmp_path):
    for results in processes.run(2, tmp_path, runs.sharded_all):
        assert results == dict.fromkeys(runs.METHODS, True)
