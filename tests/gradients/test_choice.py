"""Which product is chosen: by a forged table of costs, by the kept one, and by a measured one."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, replace

import pytest
import torch
from costs import EPYC, forge
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.gradients import choice
from unmask.gradients.choice import Cost, cache_file, calibrate, choose, costs_of, halves_pay, spread
from unmask.gradients.entries import Entries

CPU = torch.device("cpu")
HOW = ["compact", "sampled"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _costs(monkeypatch, tmp_path):
    """Gives every test the EPYC's costs, in a folder that it may change."""
    monkeypatch.setenv("UNMASK_CACHE", "")  # put back at the end
    forge(EPYC, tmp_path)
    yield
    choice._costs.cache_clear()


def entries_of(rows, columns, flat):
    flat = torch.as_tensor(flat, dtype=torch.int64).sort().values
    return Entries((rows, columns), flat, torch.arange(flat.numel()))


def scattered(rows, columns, count):
    generator = torch.Generator().manual_seed(0)
    return entries_of(rows, columns, torch.randperm(rows * columns, generator=generator)[:count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 300, 2048])
def test_the_choice_at_the_ends(dtype, tokens):
    n = 768
    assert choose(scattered(n, n, n * n // 2), tokens, dtype, CPU) == "dense"
    assert choose(entries_of(n, n, range(5 * n, 6 * n)), tokens, dtype, CPU) == "compact"  # one row
    assert choose(entries_of(n, n, range(5, n * n, n)), tokens, dtype, CPU) == "compact"  # one column
    assert choose(entries_of(n, n, []), tokens, dtype, CPU) != "dense"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_entries_all_over_a_matrix_are_sampled(dtype):
    n = 1536
    for count in (2 * n, n * n // 500, n * n // 200):
        assert choose(scattered(n, n, count), 2048, dtype, CPU) == "sampled"


def test_more_entries_move_the_choice_from_compact_over_sampled_to_dense():
    n, order = 1024, ["compact", "sampled", "dense"]
    counts = [0, 1, 8, 2_000, 10_000, 30_000, 100_000, 400_000, n * n]
    taken = [order.index(choose(scattered(n, n, count), 2048, torch.float32, CPU)) for count in counts]
    assert taken == sorted(taken)
    assert set(taken) == {0, 1, 2}


def test_few_tokens_do_not_pay_for_a_sampled_product():
    flat = torch.randperm(768 * 768, generator=torch.Generator().manual_seed(0))[:2000].sort().values
    entries = Entries((768, 768), flat, torch.arange(2000))
    chosen = [choose(entries, tokens, torch.float32, torch.device("cpu")) for tokens in (1, 512, 4096)]
    assert chosen == ["dense", "sampled", "sampled"]


def test_the_dense_product_is_not_chosen_where_it_is_not_on_offer():
    for dtype, tokens, count in itertools.product(DTYPES, (0, 1, 256, 5000), (0, 1, 64, 2000, 64 * 64)):
        assert choose(scattered(64, 64, count), tokens, dtype, CPU, dense=False) in HOW


def test_spread_counts_rows_and_columns_that_hold_entries():
    assert spread(entries_of(5, 4, [0, 1, 3, 17])) == (2, 3)
    assert spread(entries_of(48, 40, [])) == (0, 0)
    assert spread(entries_of(48, 40, range(48 * 40))) == (48, 40)


# What the choice follows.


def with_costs(tmp_path, **costs):
    forge({torch.float32: replace(EPYC[torch.float32], **costs)}, tmp_path)


@pytest.mark.parametrize(
    ("count", "before", "costs", "after"),
    [
        (20_000, "sampled", {"dot": 10.0}, "dense"),
        (20_000, "sampled", {"transpose": 10.0}, "dense"),
        (20_000, "sampled", {"start": 1e9}, "dense"),
        (20_000, "sampled", {"dense": 1e-5}, "dense"),
        (200_000, "dense", {"dot": 1e-4}, "sampled"),
        (200_000, "dense", {"dense": 1.0}, "sampled"),
        (4, "compact", {"select": 100.0}, "sampled"),
        (4, "compact", {"call": 1e9}, "sampled"),
    ],
)
def test_each_cost_moves_the_choice(tmp_path, count, before, costs, after):
    assert choose(scattered(1024, 1024, count), 2048, torch.float32, CPU) == before
    with_costs(tmp_path, **costs)
    assert choose(scattered(1024, 1024, count), 2048, torch.float32, CPU) == after


def test_a_choice_is_made_once_for_the_entries_a_count_of_tokens_and_a_dtype(monkeypatch):
    entries, made = scattered(64, 64, 10), []
    cheapest = choice._cheapest
    monkeypatch.setattr(choice, "_cheapest", lambda *given: made.append(given[1:3]) or cheapest(*given))
    for tokens, dtype in ((512, torch.float32), (512, torch.float32), (256, torch.float32), (512, torch.bfloat16)) * 2:
        choose(entries, tokens, dtype, CPU)
    assert made == [(512, torch.float32), (256, torch.float32), (512, torch.bfloat16)]


def test_a_product_in_halves_pays_only_where_it_is_much_faster(tmp_path):
    x = torch.zeros(2, 2)
    assert halves_pay(x)
    assert not halves_pay(x.bfloat16())
    slow = {dtype: replace(EPYC[dtype], dense=cost) for dtype, cost in ((torch.float32, 0.31), (torch.bfloat16, 0.59))}
    forge(slow, tmp_path)  # as on a Xeon with bfloat16 instructions
    assert not halves_pay(x)


# Measured, and kept.


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch):
    file = cache_file(CPU, torch.float32)
    file.unlink()
    choice._costs.cache_clear()
    begin = time.perf_counter()
    measured = costs_of(CPU, torch.float32)
    assert time.perf_counter() - begin < 5.0  # far below a second on an idle machine
    assert Cost(**json.loads(file.read_text())) == measured
    assert measured.dense > 0
    assert measured.dot > measured.dense
    choice._costs.cache_clear()
    monkeypatch.setattr(choice, "_measure", None)
    assert costs_of(CPU, torch.float32) == measured


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"dense": "NaN"}', "no JSON"])
def test_a_damaged_file_is_measured_again(text):
    file = cache_file(CPU, torch.bfloat16)
    file.write_text(text)
    choice._costs.cache_clear()
    assert costs_of(CPU, torch.bfloat16) == Cost(**json.loads(file.read_text()))


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_number_that_is_no_cost_is_measured_again(value):
    file = cache_file(CPU, torch.float32)
    file.write_text(json.dumps(asdict(EPYC[torch.float32]) | {"dot": value}))
    choice._costs.cache_clear()
    assert costs_of(CPU, torch.float32).dot >= 0


def test_a_folder_that_cannot_be_written_costs_a_measurement_a_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "file" / "folder"))
    choice._costs.cache_clear()
    measured = costs_of(CPU, torch.float32)
    monkeypatch.setattr(choice, "_measure", None)
    assert costs_of(CPU, torch.float32) is measured


def test_the_file_is_named_by_processor_threads_dtype_and_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "processor", lambda: "Some CPU @ 2 GHz")
    version = torch.__version__.replace("+", "-")
    file = cache_file(CPU, torch.float32, 3)
    assert file == tmp_path / "costs" / f"float32-on-3-threads-of-Some-CPU-2-GHz-torch-{version}.json"


class Counting(TorchDispatchMode):
    """Counts operations."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Counting.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_measurement_sees_none_of_the_callers_modes_and_takes_none_of_its_random_numbers():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with Counting(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        measured = calibrate(CPU, torch.float32)
    assert Counting.calls == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert measured.dense > 0


def test_nothing_is_measured_on_meta():
    assert choose(scattered(64, 64, 10), 512, torch.float32, torch.device("meta")) in ("dense", "compact")
