"""Compares sampled products with float64, and checks which product is chosen."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

import unmask
from unmask.gradients import sampled
from unmask.gradients.embedding import embedding_gradient
from unmask.gradients.entries import Entries, take_gradient
from unmask.gradients.sampled import sampled_product

CPU = torch.device("cpu")
HOW = ["compact", "sampled"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOKENS = [0, 1, 7, 127, 128, 129, 255, 256, 257, 600]


def entries_of(rows, columns, flat):
    flat = torch.as_tensor(flat, dtype=torch.int64).sort().values
    return Entries((rows, columns), flat, torch.arange(flat.numel()))


def scattered(rows, columns, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return entries_of(rows, columns, torch.randperm(rows * columns, generator=generator)[:count])


def operands(tokens, rows, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype) for width in (rows, columns)]


def assert_exact(g, x, entries, how):
    """Compares with float64, within the error of float32 dot products of this length; half precision rounds once more."""
    exact = (g.double().t() @ x.double()).reshape(-1)[entries.flat]
    size = (g.double().abs().t() @ x.double().abs()).reshape(-1)[entries.flat]  # The sum of the terms' magnitudes.
    result = sampled_product(g, x, entries, how)
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    assert result.dtype == wide
    assert result.shape == entries.flat.shape
    bound = (4 + len(g)) * torch.finfo(wide).eps * size
    if how == "compact" and wide != g.dtype:
        bound += torch.finfo(g.dtype).eps * exact.abs()
    assert (result.double() - exact).abs().le(bound + 1e-30).all()
    return result


PLACES = {
    "scattered": scattered(48, 40, 200),
    "one": entries_of(48, 40, [977]),
    "first": entries_of(48, 40, [0]),
    "last": entries_of(48, 40, [48 * 40 - 1]),
    "all": entries_of(48, 40, range(48 * 40)),
    "row": entries_of(48, 40, range(7 * 40, 8 * 40)),
    "column": entries_of(48, 40, range(13, 48 * 40, 40)),
    "corner": entries_of(48, 40, [0, 1, 40, 41]),
    "none": entries_of(48, 40, []),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_count_of_tokens(how, dtype, tokens):
    g, x = operands(tokens, 48, 40, dtype)
    assert_exact(g, x, PLACES["scattered"], how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("places", PLACES)
def test_any_places(how, dtype, places):
    g, x = operands(300, 48, 40, dtype)
    assert_exact(g, x, PLACES[places], how)


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "columns_of_a_wider": lambda t: torch.cat([t, 9 * t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "narrowed": lambda t: torch.cat([t, 9 * t], 1)[:, : t.shape[1]],
    "every_second_row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every_second_column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda t: torch.cat([9 * t[:1], t])[1:],
    "one_row_for_all": lambda t: t[:1].expand(t.shape),
    "one_column_for_all": lambda t: t[:, :1].expand(t.shape),
    "one_number": lambda t: t[:1, :1].expand(t.shape),
    "overlapping": lambda t: t.reshape(-1)[: t.shape[0] + t.shape[1] - 1].unfold(0, t.shape[1], 1),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_strides(how, dtype):
    for tokens in (1, 130, 385):
        g, x = operands(tokens, 48, 40, dtype)
        for left, right in itertools.product(LAYOUTS.values(), repeat=2):
            assert_exact(left(g), right(x), PLACES["scattered"], how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(512, 1024), (1024, 256), (528, 512), (1, 512), (512, 1)])
def test_widths_whose_rows_share_a_cache_set(dtype, widths):
    g, x = operands(270, *widths, dtype)
    for how in HOW:
        assert_exact(g, x, scattered(*widths, min(400, widths[0] * widths[1])), how)
        assert_exact(g.t().contiguous().t(), x, scattered(*widths, 17), how)


def in_a_fresh_thread(function):
    """Runs in a new thread, whose scratch memory is empty."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_product_does_not_depend_on_larger_ones_before_it():
    jobs = []
    for tokens, rows, columns in [(600, 512, 512), (3, 20, 30), (257, 30, 512), (129, 512, 20), (1, 5, 4)]:
        job = (*operands(tokens, rows, columns), scattered(rows, columns, 20), "sampled")
        jobs.append((job, in_a_fresh_thread(lambda job=job: sampled_product(*job))))
    huge = torch.full((600, 700), torch.nan)  # It fills every buffer that is kept with NaN.
    for spoil in (huge, huge.t().contiguous().t()):
        sampled_product(spoil, spoil, scattered(700, 700, 3), "sampled")
    for job, expected in [*jobs, *reversed(jobs)]:
        assert torch.equal(sampled_product(*job), expected)
        assert_exact(*job)


def test_the_same_memory_with_other_contents_or_strides_is_another_operand():
    g, x = operands(300, 48, 48)
    for change in (
        lambda: x.mul_(2),
        lambda: x[7:9].zero_(),
        lambda: x.view(-1)[5:50].neg_(),
        lambda: g.add_(1),
        lambda: None,
    ):
        for left, right in ((g, x), (x, g), (g[:48], x[:48].t()), (g[:48], x[:48]), (g[:200], x[:200]), (g, x)):
            assert_exact(left, right, scattered(48, 48, 300), "sampled")
        change()
    for _ in range(5):  # Each input may take the place of the one before it.
        assert_exact(g, torch.randn(300, 48), scattered(48, 48, 300), "sampled")


@pytest.mark.parametrize("how", HOW)
def test_the_operands_are_not_changed_and_a_later_product_leaves_the_result_alone(how):
    g, x = operands(200, 48, 40)
    before = g.clone(), x.clone()
    first = sampled_product(g, x, PLACES["scattered"], how)
    kept = first.clone()
    second = sampled_product(2 * g, x, PLACES["scattered"], how)
    assert torch.equal(first, kept)
    assert torch.equal(second, 2 * kept)
    assert torch.equal(g, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_product_twice_is_the_same_bitwise(how, dtype):
    g, x = operands(600, 96, 64, dtype)
    entries = scattered(96, 64, 333)
    first = sampled_product(g, x, entries, how)
    assert all(torch.equal(first, sampled_product(g, x, entries, how)) for _ in range(3))


def test_threads_do_not_share_scratch_memory():
    jobs = [(operands(150 + 60 * i, 64, 48, seed=i), scattered(64, 48, 50 + i, seed=i)) for i in range(4)]
    expected = [sampled_product(g, x, entries, "sampled") for (g, x), entries in jobs]
    wrong, start = [], threading.Barrier(len(jobs))

    def work(i):
        (g, x), entries = jobs[i]
        start.wait()
        wrong.extend(i for _ in range(60) if not torch.equal(sampled_product(g, x, entries, "sampled"), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_not_a_number_stays_in_its_row_and_column():
    g, x = operands(300, 48, 40)
    g[280, 3], x[5, 7] = torch.nan, torch.inf
    entries = PLACES["all"]
    for how in HOW:
        result = sampled_product(g, x, entries, how)
        spoilt = (entries.rows == 3) | (entries.columns == 7)
        assert torch.equal(~torch.isfinite(result), spoilt)


# The memory.


def test_bands_of_rows_do_not_change_a_bit(monkeypatch):
    g, x = operands(300, 50, 40)
    flat = torch.cat([torch.arange(0, 350, 3), torch.arange(1200, 2000, 7)])  # rows 9 to 29 hold none
    entries = entries_of(50, 40, flat)
    whole = sampled_product(g, x, entries, "sampled")
    monkeypatch.setattr(sampled, "ROWS", 8)
    sampled.release_buffers()
    assert torch.equal(sampled_product(g, x, entries_of(50, 40, flat), "sampled"), whole)
    sizes = {name: buffer.numel() for (_, name, _), buffer in sampled._buffers.items()}
    assert sizes["g"] == 256 * 8


def test_the_scratch_memory_ends_with_the_selection():
    model = torch.nn.Linear(256, 256, bias=False)
    selection = unmask.select(model, unmask.random_mask(300), gradients="sampled")
    model(torch.randn(600, 256, requires_grad=True)).square().sum().backward()
    assert sampled._buffers
    selection.release()
    assert not sampled._buffers


# The gradient of an embedding.


@pytest.mark.parametrize("padding", [None, 0, 4])
def test_an_embeddings_gradient_by_rows_is_autograds(padding):
    ids = torch.randint(0, 9, (70,), generator=torch.Generator().manual_seed(1))
    weight = torch.randn(12, 5, requires_grad=True)
    g = torch.randn(70, 5)
    torch.nn.functional.embedding(ids, weight, padding).backward(g)
    rows = embedding_gradient(g, ids, torch.Size((12, 5)), padding)
    assert rows.is_coalesced()
    torch.testing.assert_close(rows.to_dense(), weight.grad)
    entries = entries_of(12, 5, range(0, 60, 3))
    torch.testing.assert_close(take_gradient(rows, entries), weight.grad.reshape(-1)[entries.flat])
    torch.testing.assert_close(take_gradient(weight.grad, entries), weight.grad.reshape(-1)[entries.flat])


@pytest.mark.parametrize("ids", [[], [0], [0, 0], [11]])
def test_rows_at_the_ends_of_the_table(ids):
    g = torch.randn(len(ids), 5)
    expected = torch.zeros(12, 5).index_add_(0, torch.tensor(ids, dtype=torch.int64), g)
    rows = embedding_gradient(g, torch.tensor(ids, dtype=torch.int64), torch.Size((12, 5)), padding=0)
    expected[0] = 0
    for flat in ([], [0], [59], range(60)):
        entries = entries_of(12, 5, flat)
        torch.testing.assert_close(take_gradient(rows, entries), expected.reshape(-1)[entries.flat])
