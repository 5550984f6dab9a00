"""Checks that every reader reads a damaged or hostile file right, or refuses it with an error of unmask."""

from __future__ import annotations

import resource
from collections import Counter

import pytest
from mutating import Mutator
from reader_cases import OTHER, READERS, REFUSED, SAME, run_case

CASES = {
    "delta_file": 1200,
    "signed_delta": 400,
    "signed_coded": 1200,
    "ladder_file": 600,
    "signed_ladder": 800,
    "state_dict": 400,
    "state_file": 300,
    "adapter_weights": 200,
    "adapter_config": 400,
    "settings_file": 300,
    "sweep_file": 200,
    "sweep_record": 150,
    "run_folder": 300,
    "outputs": 300,
    "data_csv": 250,
    "data_tsv": 250,
    "data_json": 250,
    "data_jsonl": 250,
    "data_parquet": 250,
    "data_conll": 250,
    "data_tagged": 250,
    "data_glue": 250,
    "data_problems": 250,
    "checkpoint_files": 300,
}

MOST_MEMORY = 500_000  # kB that all cases of a reader may add to the process's peak


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_right_or_refused(name, tmp_path):
    case = READERS[name](tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = Counter(run_case(case, name, seed) for seed in range(CASES[name]))
    assert counts.total() == CASES[name]
    assert counts[REFUSED] > CASES[name] // 3  # the mutations do damage
    assert set(counts) <= {SAME, OTHER, REFUSED}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


def test_a_mutation_is_a_function_of_its_seed():
    value = {"a": [1, {"b": "c"}], "d": 0.5}
    assert [repr(Mutator(seed).changed(value)) for seed in range(50)] == [
        repr(Mutator(seed).changed(value)) for seed in range(50)
    ]
    data = bytes(range(64))
    damaged = [Mutator(seed).damaged(data) for seed in range(200)]
    assert damaged == [Mutator(seed).damaged(data) for seed in range(200)]
    assert sum(found != data for found in damaged) > 180
    assert value == {"a": [1, {"b": "c"}], "d": 0.5}
