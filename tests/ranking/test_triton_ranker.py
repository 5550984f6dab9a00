"""Runs the ranking by Triton kernels in Triton's interpreter, against one dense sort on the CPU.

The interpreter must be chosen before triton is imported, so this file is also the script that runs the cases in another
process; the tests compare what it saved.
"""

from __future__ import annotations

import collections
import itertools
import math
import sys

import pytest
import torch
from ledgers import a_ledger, ranked_by, some_gradients
from memory import peaks
from ranking_cases import MINE, Case, cases
from torch import Tensor, nn
from triton_runs import needs_triton, python

import unmask
from unmask.errors import NonFiniteGradientError
from unmask.gradients import backend
from unmask.lab.bench.host import Operations
from unmask.methods.heuristics import Heuristic, heuristic
from unmask.ranking import triton_buffer
from unmask.ranking.topk import Ranked
from unmask.ranking.triton_buffer import BestBuffer, Formula, Sizes, available
from unmask.ranking.triton_ranker import TritonRanker
from unmask.ranking.unwaiting import new_ranker

BROKEN = [heuristic("d3"), MINE[0]]
RISING = torch.arange(500.0).div(10, rounding_mode="floor")


def shrink(small: bool) -> None:
    """Makes blocks and buffers so small that a buffer is cut back several times, or the usual ones again."""
    sizes = (64, 128, 64) if small else (2048, 8192, 1 << 16)
    triton_buffer._APPENDED, triton_buffer._READ, triton_buffer._LEAST = sizes


def broken(value: float, by: Heuristic) -> str:
    """Returns the error of a ranking in which one number is not finite."""
    ledger = a_ledger()
    gradients = some_gradients(ledger)
    gradients[3][1, 1, 2], ledger.layout.tensors[3][1, 1, 2] = value, 2.0
    try:
        ranked_by(TritonRanker(by, ledger, 9, 0, True), gradients, range(7))
    except NonFiniteGradientError as error:
        return str(error)
    return ""


def followed(scores: Tensor) -> dict[str, object]:
    """Offers blocks of scores; watches how full the buffer gets."""
    sizes = Sizes.of(7, scores.numel())
    buffer, counts = BestBuffer(sizes, -torch.inf, 1, torch.device("cpu")), []
    for low in range(0, scores.numel(), sizes.room):
        buffer.offer(0, 0, low, scores[low : low + sizes.room], None, None, Formula("gradient"))
        counts.append(int(buffer.status[0]))
    buffer.cut_back()
    return {"found": buffer.ranked(int(buffer.status[0])), "counts": counts, "capacity": buffer._keys.numel()}


def at_random() -> dict[str, object]:
    """Ranks numbers in random order by a buffer that has room for all; watches how many enter."""
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    buffer, counts = BestBuffer(Sizes(8, 64, 4096, 5000), 0.0, 1, torch.device("cpu")), []
    for low, high in itertools.pairwise([0, 64, 128, 256, 512, 1024, 2048, 4096, 5000]):
        buffer.offer(0, 0, low, scores[low:high], None, None, Formula("gradient"))
        counts.append(int(buffer.status[0]))
    buffer.cut_back()
    return {"found": buffer.ranked(int(buffer.status[0])), "counts": counts, "scores": scores}


def far() -> Ranked:
    """Ranks equal scores at positions that need more than 32 bits, the later ones first."""
    buffer, scores = BestBuffer(Sizes(5, 64, 64, 1 << 40), 0.0, 1, torch.device("cpu")), torch.ones(64)
    for first in (1 << 35, (1 << 31) + 3, 1 << 33):
        members = torch.tensor([(1 << 31) + 4, 1 << 38])
        buffer.offer(0, 1 << 32, first, scores, None, members, Formula("gradient"))
    buffer.cut_back()
    return buffer.ranked(int(buffer.status[0]))


def on_two_devices() -> Ranked:
    """Ranks tensors of which the last three count as those of another device."""
    ledger = a_ledger()
    gradients = some_gradients(ledger)
    ranker = TritonRanker(heuristic("d3"), ledger, 9, 4, True)
    for index in range(7):
        if index == 4:
            ranker._buffers = {torch.device("meta"): ranker._buffers[torch.device("cpu")]}
        ranker.rank(index, gradients[index])
    assert len(ranker._buffers) == 2
    return ranker.result()


def counted() -> dict[str, object]:
    """Counts the launches of a ranking and what else would make the host wait, before its result and in it."""
    operations, launches = Operations(), collections.Counter()
    kernels = triton_buffer.kernels()

    class Launched:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            def launch(*arguments: object, **options: object) -> None:
                before = operations.waiting.copy()  # The interpreter reads what a launch on a device does not.
                self.kernel[grid](*arguments, **options)
                operations.waiting = before
                launches[self.kernel.fn.__name__] += 1

            return launch

    triton_buffer.kernels = lambda: tuple(Launched(kernel) for kernel in kernels)
    ledger = a_ledger()
    gradients = some_gradients(ledger)
    with operations:
        ranker = TritonRanker(heuristic("d3"), ledger, 9, 0, True)
        for index in range(7):
            ranker.rank(index, gradients[index])
        early = operations.waiting.copy()
        ranker.result()
    triton_buffer.kernels = lambda: kernels
    return {"launches": dict(launches), "early": dict(early), "waiting": dict(operations.waiting)}


class Net(nn.Module):
    """Has an embedding, linear layers and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=i == 0) for i in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.norm(x)


METHODS = {
    "id3": unmask.id3(60, 6),
    "id3 by magnitude": unmask.id3(60, 6, exp=0.0),
    "repeat": unmask.repeat_d3(40),
    "repeat, kept": unmask.repeat_d3(40, leaving="kept"),
    "static by gradient": unmask.static_d3(60),
    "pafi": unmask.pafi(60),
}


def trained(name: str) -> tuple[Tensor, Tensor]:
    """Returns the positions and the values of a short training."""
    model = Net()
    selection = unmask.select(model, METHODS[name], gradients="dense")
    optimizer = torch.optim.SGD(selection.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        model(torch.randint(0, 50, (4, 6), generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return selection.ledger.positions.clone(), selection.ledger.values.detach().clone()


def chosen() -> list[str]:
    """Returns which ranking each of several methods gets on CUDA."""
    by, table = unmask.heuristic("d3"), a_ledger()
    double = a_ledger(torch.float64)
    double.base = double.base.double()
    spread = unmask.id3(20, 5).but(allocation="row")
    whole = unmask.id3(20, 5).but(heuristic=Heuristic("by rows", lambda w, g: g / w.norm(), elementwise=False))
    pairs = [(unmask.id3(20, 5).but(heuristic=by), table), (unmask.id3(20, 5), double), (spread, table), (whole, table)]
    return [type(new_ranker(method, ledger, 9, 0, True)).__name__ for method, ledger in pairs]


def interpret(path: str) -> None:
    """Runs every case and saves the results."""
    runs: dict[str, object] = {"available": available(torch.device("cpu"))}
    for name, case in cases().items():
        shrink(case.small)
        runs[name] = tuple(case.rank())
    shrink(True)
    runs["broken"] = [broken(value, by) for by in BROKEN for value in (math.nan, math.inf, -math.inf)]
    runs["rising"], runs["falling"] = followed(RISING), followed(RISING.flip(0))
    runs["far"], runs["at random"] = far(), at_random()
    runs["two devices"] = tuple(on_two_devices())
    runs["counted"] = counted()
    runs["nothing"] = TritonRanker(heuristic("d3"), a_ledger(), 9, 0, True).result().positions
    shrink(False)
    backend._PORTABLE = backend._CUDA
    with backend.portable():
        runs["trained"] = {name: trained(name) for name in METHODS}
        runs["chosen"] = chosen()
        runs["peaks"] = peaks(unmask.static_d3(500), 12, 256, 1024)
    torch.save(runs, path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("interpreted") / "runs.pt")
    python(__file__, path, TRITON_INTERPRET="1")
    return torch.load(path, weights_only=False)


def assert_same(found: tuple[Tensor, ...], expected: Ranked) -> None:
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert torch.equal(a.cpu(), b), name


@needs_triton
@pytest.mark.parametrize("name", cases())
def test_the_entries_are_those_of_one_dense_sort(runs, name):
    assert_same(runs[name], cases()[name].reference())


@needs_triton
def test_the_cases_rank_something(runs):
    assert runs["available"] is True
    assert [name for name in cases() if not runs[name][0].numel()] == ["k of none"]


@needs_triton
def test_a_number_that_is_not_finite_is_refused_with_its_tensor(runs):
    scores = {"d3": ("nan", "inf", "inf"), "strided": ("nan", "inf", "-inf")}
    expected = [f"a score of 't3' is {score} (heuristic '{by.name}')" for by in BROKEN for score in scores[by.name]]
    assert [error[: len(start)] for error, start in zip(runs["broken"], expected, strict=True)] == expected


@needs_triton
@pytest.mark.parametrize("which", ["rising", "falling"])
def test_a_buffer_never_overflows_and_what_is_worse_than_its_cut_off_stays_out(runs, which):
    scores, run = RISING if which == "rising" else RISING.flip(0), runs[which]
    order = scores.argsort(descending=True, stable=True)[:7]
    assert torch.equal(run["found"].positions, order)
    assert torch.equal(run["found"].scores, scores[order])
    assert max(run["counts"]) <= run["capacity"] == 128
    if which == "falling":
        assert run["counts"][2:] == [7] * (len(run["counts"]) - 2)
    else:
        assert max(run["counts"]) > 64


@needs_triton
def test_few_entries_in_random_order_enter_a_buffer_that_has_room_for_all(runs):
    run = runs["at random"]
    best = run["scores"].topk(8)
    assert run["found"].scores.equal(best.values)
    assert run["found"].positions.equal(best.indices)
    assert max(run["counts"]) <= 64 + 32


def test_positions_may_need_more_than_32_bits(runs):
    first = (1 << 32) + (1 << 31) + 3
    assert runs["far"].positions.tolist() == [first, *range(first + 2, first + 6)]  # without a member


@needs_triton
def test_buffers_of_several_devices_are_merged(runs):
    assert_same(runs["two devices"], Case(heuristic("d3")).reference())


@needs_triton
def test_a_ranking_waits_once_and_launches_one_kernel_a_tensor(runs):
    counted = runs["counted"]
    assert counted["early"] == {}
    assert counted["waiting"] == {"tolist": 1}
    tensors, blocks = 6, 16 * 16 // 64 - 1  # one tensor has no entries; the largest comes in blocks
    assert counted["launches"]["_append_kernel"] == tensors + blocks
    assert counted["launches"]["_cut_kernel"] <= tensors + blocks
    assert runs["nothing"].tolist() == []


@needs_triton
@pytest.mark.parametrize("name", METHODS)
def test_training_by_the_kernels_is_training_on_the_cpu(runs, name):
    positions, values = trained(name)
    assert positions.ge(0).sum() >= 30
    assert torch.equal(runs["trained"][name][0], positions)
    torch.testing.assert_close(runs["trained"][name][1], values, rtol=1e-5, atol=1e-7)


@needs_triton
def test_a_selecting_step_takes_the_memory_of_a_frozen_backward_and_a_gradient(runs):
    frozen, selecting, gradient = runs["peaks"]
    assert selecting <= 1.08 * frozen + gradient


@needs_triton
def test_what_the_kernels_do_not_serve_is_ranked_as_before(runs):
    assert runs["chosen"] == ["TritonRanker", "UnwaitingRanker", "Ranker", "Ranker"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name, case in cases().items() if case.elsewhere])
def test_on_a_gpu(name, monkeypatch):
    for size in ("_APPENDED", "_READ", "_LEAST"):
        monkeypatch.setattr(triton_buffer, size, 128)
    assert available(torch.device("cuda"))
    first, second = cases()[name].rank("cuda"), cases()[name].rank("cuda")
    assert_same(first, cases()[name].reference())
    assert_same(second, Ranked(*(column.cpu() for column in first)))


if __name__ == "__main__":
    interpret(sys.argv[1])
