"""Tests the rows of ``unmask bench --delta`` on a tiny model. No assertion is about a time."""

from __future__ import annotations

import json

import pytest
import torch
from bench_tiny import BUDGET, settings_for, write_config
from helpers import assert_same_tensors, snapshot

from unmask.delta.base import base_tensors
from unmask.delta.fingerprint import digest, fingerprint
from unmask.errors import ConfigError
from unmask.lab.bench import deltas, tables
from unmask.lab.bench.deltas import DeltaBench, random_delta, run_deltas
from unmask.lab.bench.models import blueprint
from unmask.lab.bench.settings import BenchSettings

ROWS = [
    "delta: load",
    "delta: apply, just loaded",
    "delta: apply",
    "delta: undo",
    "delta: apply in full",
    "delta: swap, other places",
    "delta: swap, the same places",
    "the same writes, unchecked",
    "whole checkpoint: load",
    "LoRA, r = 8: set_adapter",
    "LoRA, r = 8: merge_adapter, unmerge_adapter",
]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats each row twice, for no time is asserted."""
    monkeypatch.setattr(deltas, "_FAST", 2)
    monkeypatch.setattr(deltas, "_SLOW", 2)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_record_and_its_table(dtype, tmp_path):
    settings = settings_for(write_config(tmp_path / "model"), tmp_path / "out", dtype=dtype, delta=True)
    said: list[str] = []
    usual = torch.get_num_threads()
    try:
        record = run_deltas(settings, "unmask bench --delta", said.append)
    finally:
        torch.set_num_threads(usual)
    assert json.loads((tmp_path / "out/delta.json").read_text()) == record
    assert [row["row"] for row in record["rows"]] == ROWS
    assert [line.split(":")[0] for line in said] == [row.split(":")[0] for row in ROWS]
    assert all(row["seconds"] >= row["least"] > 0 for row in record["rows"])
    assert (record["budget"], record["dtype"], record["machine"]["threads"]) == (BUDGET, dtype, 1)
    lines = tables.delta(record)
    assert {len(line) for line in lines} == {len(tables.DELTA)}
    assert [line[-1] for line in lines if line[-1] != "-"] == ["0.0", "0.0", "0.0"]


def test_the_deltas_are_of_the_budget_and_the_rows_leave_the_base(tmp_path):
    settings = settings_for(write_config(tmp_path / "model"), tmp_path / "out", dtype="bf16")
    model = blueprint(settings).build()
    base = fingerprint({name: digest(tensor) for name, tensor in base_tensors(model).items()})
    first, second = (random_delta(model, base, BUDGET, seed) for seed in (1, 2))
    assert len(first) == len(second) == BUDGET
    assert any(
        not torch.equal(first.sparse[n].indices, second.sparse[n].indices) for n in first.sparse if n in second.sparse
    )
    before = snapshot(model)
    first.apply(model, verify="full").apply(model)
    assert_same_tensors(snapshot(model), before)
    bench = DeltaBench(settings, tmp_path, say=lambda line: None)
    before = snapshot(bench._model)
    bench._measure_applying(random_delta(bench._model, base, BUDGET, 1))
    assert_same_tensors(snapshot(bench._model), before)


def test_it_is_measured_by_itself():
    with pytest.raises(ConfigError, match="host and delta are measured one at a time"):
        BenchSettings(host=True, delta=True)
