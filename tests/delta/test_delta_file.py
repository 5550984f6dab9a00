"""Checks the delta's file: reading notices every damaged byte, and saving writes the whole file or nothing."""

from __future__ import annotations

import copy
import json
import os
import zipfile

import pytest
import torch
from helpers import assert_same_tensors, snapshot, trained
from safetensors.torch import save_file

from unmask import DeltaError, SparseDelta, SparseTensor, files


def entry(indices, values=None, shape=(2, 3)):
    indices = torch.tensor(indices)
    return SparseTensor(indices, torch.zeros(len(indices)) if values is None else torch.tensor(values), shape)


BROKEN = {
    "outside": entry([0, 6]),
    "outside ": entry([-1, 0]),
    "ascend": entry([3, 2]),
    "ascend ": entry([2, 2]),
    "NaN": entry([0, 1], [0.0, float("nan")]),
    "NaN or infinite": entry([0], [float("inf")]),
    "indices for": entry([0, 1], [1.0]),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_damaged_entry_is_refused_when_built_and_when_read(reason, tmp_path, saved):
    with pytest.raises(DeltaError, match=reason.strip()):
        SparseDelta({"w": BROKEN[reason]}, {}, "sha256:0")
    sound = SparseDelta({"w": entry([0, 1])}, {}, "sha256:0")
    object.__setattr__(sound, "sparse", {"w": BROKEN[reason]})  # written by another program, with a right checksum
    path = sound.save(tmp_path / "broken.safetensors", compress=False)
    with pytest.raises(DeltaError, match=reason.strip()):
        SparseDelta.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_delta_of_a_diverged_run_is_refused(value):
    _, tuned, selection = trained(dense="head")
    tuned.head.bias.data[0] = value
    with pytest.raises(DeltaError, match=r"'head\.bias' holds NaN or infinite"):
        selection.delta()


@pytest.mark.parametrize("compress", [True, False])
def test_every_flipped_bit_is_noticed(compress, saved, tmp_path):
    data = SparseDelta.load(saved[1]).save(tmp_path / "whole.safetensors", compress).read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    positions = {*range(16), *range(16, head, head // 120), *range(head, len(data), (len(data) - head) // 80)}
    broken = tmp_path / "flipped.safetensors"
    for position in sorted(positions):
        for bit in (1 << (position % 8), 0x20):  # 0x20 is the case of a letter
            flipped = bytearray(data)
            flipped[position] ^= bit
            broken.write_bytes(flipped)
            with pytest.raises(DeltaError):
                SparseDelta.load(broken)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -200, -1])
def test_a_truncated_file_is_refused(saved, tmp_path, kept):
    broken = tmp_path / "short.safetensors"
    broken.write_bytes(saved[2][:kept])
    with pytest.raises(DeltaError, match=r"short\.safetensors"):
        SparseDelta.load(broken)


def test_bytes_behind_the_end_are_refused(saved, tmp_path):
    broken = tmp_path / "long.safetensors"
    broken.write_bytes(saved[2] + b"\0")
    with pytest.raises(DeltaError):
        SparseDelta.load(broken)


def test_another_format_version_is_refused_by_name(saved, tmp_path):
    tensors, header = files.read_tensors(saved[1])
    path = files.write_tensors(tmp_path / "newer.safetensors", tensors, header | {"format_version": 4})
    with pytest.raises(DeltaError, match="format version 4"):
        SparseDelta.load(path)


def test_a_foreign_file_and_a_missing_one_are_refused(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(DeltaError, match="lacks the 'unmask' metadata"):
        SparseDelta.load(tmp_path / "foreign.safetensors")
    with pytest.raises(DeltaError, match="there is no delta at"):
        SparseDelta.load(tmp_path / "absent.safetensors")
    with pytest.raises(DeltaError, match="there is no delta at"):
        SparseDelta.load(tmp_path)


def test_nothing_in_the_file_is_pickled(saved):
    _, path, data = saved
    assert not zipfile.is_zipfile(path)
    head = 8 + int.from_bytes(data[:8], "little")
    layout = json.loads(data[8:head])
    spans = sorted(t["data_offsets"] for key, t in layout.items() if key != "__metadata__")
    assert [low for low, _ in spans] == [0, *(high for _, high in spans[:-1])]  # the tensors, and no other byte
    assert spans[-1][1] == len(data) - head


def test_a_save_that_fails_leaves_the_old_file_and_no_other(saved, monkeypatch):
    _, path, data = saved
    delta = SparseDelta.load(path)

    def die(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="disk full"):
        delta.save(path)
    assert path.read_bytes() == data
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "regrow", "strategy": "increment", "schedule": "at_once", "drop": 0.3},
        {"name": "lift", "heuristic": "lift", "parameters": {"rank": 2}, "allocation": "tensor"},
        {"name": "id3", "normalise": "row-column", "drop": 0.5},
    ],
    ids=str,
)
def test_a_delta_of_a_retired_method_loads_and_applies(method, saved, tmp_path):
    base, path, _ = saved
    delta = SparseDelta.load(path)
    old = SparseDelta.load(delta.with_metadata(method=method).save(tmp_path / "old.safetensors"))
    assert old.metadata["method"] == method
    models = copy.deepcopy(base), copy.deepcopy(base)
    delta.apply(models[0])
    old.apply(models[1])
    assert_same_tensors(snapshot(models[0]), snapshot(models[1]))
