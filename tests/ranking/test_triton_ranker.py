"""Runs the ranking by Triton kernels in Triton's interpreter, against one dense sort on the CPU, and compiles it for absent GPUs.

The interpreter must be chosen before triton is imported, so this file is also the script that runs the cases in another
process; the tests compare what it saved.
"""

from __future__ import annotations

import collections
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ledgers import HEURISTICS, SHAPES, a_ledger, densely, ranked_by, some_gradients
from memory import peaks
from torch import Tensor, nn

import unmask
from unmask.errors import NonFiniteGradientError
from unmask.gradients import backend
from unmask.gradients.factors import Factors
from unmask.lab.bench.host import Operations
from unmask.methods.heuristics import Heuristic, heuristic
from unmask.ranking import triton_buffer
from unmask.ranking.ledger import Layout, Ledger
from unmask.ranking.topk import Ranked
from unmask.ranking.triton_buffer import DTYPES, GIVEN, BestBuffer, Formula, Sizes, available
from unmask.ranking.triton_ranker import TritonRanker, formula_of
from unmask.ranking.unwaiting import new_ranker

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install --no-deps -r requirements-test.txt",
)


class Rows(Tensor):
    """Is read as a quantised weight is: a run of rows at a time."""


@dataclass(frozen=True)
class Case:
    """One ranking.

    Attributes:
        by: The heuristic.
        keep: The number k of entries to keep.
        coarse: True makes many equal scores.
        small: True makes blocks and buffers so small that a buffer is cut back several times.
        exclude: True leaves out what is unmasked.
        weights: The dtype of the weights.
        gradients: The dtype of the gradients.
        spread: True makes numbers of all magnitudes. Those below the smallest normal number are among them, but not in bfloat16,
            where Triton's interpreter (but no GPU) takes them for zero.
        given: How the tensors are given: ``"plain"``, ``"transposed"``, ``"rows"`` or as ``"factors"``.
        unreached: The tensors that the loss did not reach.
    """

    by: Heuristic
    keep: int = 9
    coarse: bool = False
    small: bool = True
    exclude: bool = True
    weights: torch.dtype = torch.float32
    gradients: torch.dtype = torch.float32
    spread: bool = False
    given: str = "plain"
    unreached: tuple[int, ...] = ()

    def ledger(self) -> Ledger:
        ledger = a_ledger(self.weights, coarse=self.coarse)
        if self.spread:
            for tensor in ledger.layout.tensors:
                tensor.mul_(_scales(tensor.shape, 20).to(tensor.dtype))
        return ledger

    def dense(self, ledger: Ledger) -> list[Tensor] | None:
        """Returns the gradients, zero where the loss did not reach a tensor."""
        if self.by.needs != "gradient":
            return None
        found = [g.to(self.gradients) for g in some_gradients(ledger, self.coarse)]
        if self.spread:
            most = {torch.float16: 20, torch.bfloat16: 100}.get(self.gradients, 140)
            found = [g.mul(_scales(g.shape, most).to(g.dtype)) for g in found]
        if self.given == "factors":
            found[6] = _factors(self.gradients).dense()
        return [g * (index not in self.unreached) for index, g in enumerate(found)]

    def rank(self, device: str = "cpu") -> Ranked:
        ledger = self.ledger()
        gradients = self.dense(ledger)
        layout = ledger.layout
        if device != "cpu":
            ledger, gradients = _moved(ledger, device), gradients and [g.to(device) for g in gradients]
            layout = ledger.layout
        if self.given == "transposed":
            layout.tensors[6] = layout.tensors[6].t().contiguous().t()
            gradients = gradients and [g.t().contiguous().t() if g.ndim == 2 else g for g in gradients]
        if self.given == "rows":
            layout.tensors = [tensor.as_subclass(Rows) if tensor.ndim > 1 else tensor for tensor in layout.tensors]
        if self.given == "factors":
            gradients[6] = _factors(self.gradients)
        order = torch.randperm(len(SHAPES), generator=torch.Generator().manual_seed(self.keep)).tolist()
        ranker = TritonRanker(self.by, ledger, self.keep, 4, self.exclude)
        return ranked_by(ranker, gradients, order, self.unreached)

    def reference(self) -> Ranked:
        ledger = self.ledger()
        return densely(self.by, ledger, self.dense(ledger), self.keep, 4, self.exclude)


def _scales(shape: torch.Size, most: int) -> Tensor:
    """Returns powers of two from 2^-most to 2^most/2."""
    generator = torch.Generator().manual_seed(shape.numel())
    return torch.pow(2.0, torch.randint(-most, most // 2, shape, generator=generator).double()).float()


def _factors(dtype: torch.dtype) -> Factors:
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(3, 16, generator=generator).to(dtype) for _ in range(2))
    return Factors(left, right, dtype)


def _moved(ledger: Ledger, device: str) -> Ledger:
    layout = Layout(ledger.layout.names, [tensor.to(device) for tensor in ledger.layout.tensors])
    moved = Ledger(layout, nn.Parameter(ledger.values.detach().to(device)), ledger.budget)
    held = ledger.positions[ledger.positions >= 0].to(device)
    moved.assign(torch.arange(held.numel(), device=device), held, layout.read(held, torch.float32))
    return moved


# A heuristic of a user may return scores with any strides and dtype.
MINE = [
    Heuristic("strided", lambda w, g: torch.stack([g * w, g], -1)[..., 0]),
    Heuristic("one number", lambda w, g: w.new_ones(()).expand(w.shape)),
    Heuristic("double", lambda w, g: (g / w.abs().clamp_min(1e-3)).double()),
]
FORMULAS = [heuristic("gradient"), heuristic("snip"), *(heuristic("d3", eps=0.3, exp=e) for e in (-1.0, 0.0, 1.0, 2.0))]
COMPILED = [  # compute capability, dtype, formula
    *((90, torch.bfloat16, formula) for formula in (*map(formula_of, FORMULAS[:3]), Formula("d3", 0.5, 2), GIVEN)),
    *(
        (gpu, dtype, Formula("d3", 0.5, 2))
        for gpu, dtype in ((90, torch.float32), (90, torch.float16), (80, torch.bfloat16))
    ),
]
BROKEN = [heuristic("d3"), MINE[0]]
SCORED = [heuristic("d3", exp=0.5), heuristic("d3", exp=-2.0), heuristic("d3", exp=0.3)]  # by torch


RISING = torch.arange(500.0).div(10, rounding_mode="floor")


def cases() -> dict[str, Case]:
    found = {}
    for by in [*HEURISTICS, *MINE, *SCORED]:
        found[f"{by.name}-{dict(by.parameters)}"] = Case(by, spread=by in SCORED)
    for name, keep, coarse in itertools.product(("d3", "constant", "small_magnitude"), (1, 20, 1000), (False, True)):
        found[f"{name}, k {keep}, {'ties' if coarse else 'distinct'}"] = Case(heuristic(name), keep, coarse)
    for by, weights, gradients in itertools.product(FORMULAS, DTYPES, DTYPES):
        if weights == gradients or weights == torch.float32:
            name = f"bits of {by.name}-{dict(by.parameters)}, {weights} {gradients}"
            found[name] = Case(by, 1000, small=False, weights=weights, gradients=gradients, spread=True)
    d3 = heuristic("d3")
    for given in ("transposed", "rows", "factors"):
        found[given] = Case(d3, given=given)
    found["float64 gradients"] = Case(d3, gradients=torch.float64)
    found["zeros of both signs"] = Case(MINE[0], 150, coarse=True)
    found["large blocks"] = Case(d3, small=False)
    found["all compete"] = Case(d3, exclude=False)
    found["unreached"] = Case(d3, 1000, unreached=(2, 6))
    found["unreached, but they have a score"] = Case(MINE[0], 1000, unreached=(2, 6))
    found["k of none"] = Case(d3, 0)
    return found


def shrink(small: bool) -> None:
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
    """Returns the positions and the values of a short training, and checks that the kernels ranked where they should."""
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
    runs["far"] = far()
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


def assemble(path: str) -> None:
    """Compiles the kernels for each GPU and dtype by way of the real calls, up to the launch, and saves the assembly."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    found: dict[object, dict[str, tuple[str, str]]] = collections.defaultdict(dict)
    original = JITFunction.run

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        found[key][kernel.hash] = (self.__name__, kernel.asm["ptx"])

    JITFunction.run = run
    driver = types.SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    for key in COMPILED:
        capability, dtype, formula = key
        driver.get_current_target = types.MethodType(lambda target: target, GPUTarget("cuda", capability, 32))
        triton.runtime.driver.set_active(driver)
        triton_buffer.kernels.cache_clear()
        buffer = BestBuffer(Sizes.of(5, 1000), 0.0, 1, torch.device("cpu"))
        for size, members in ((64, None), (256, torch.arange(3))):
            block = torch.ones(size, dtype=dtype)
            other = block.float() if formula is GIVEN else block
            buffer.offer(0, 3, 1024, block, other, members, formula)
        buffer.cut_back()
    key = "odd"
    for size in (7, 1):
        buffer.offer(0, 1 << 33, 1 << 32, block[:size], other[:size], members, formula)
    torch.save({repr(key): list(kernels.values()) for key, kernels in found.items()}, path)


def python(*arguments: str, **environment: str) -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("interpreted") / "runs.pt")
    python(__file__, "interpret", path, TRITON_INTERPRET="1")
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    python(__file__, "assemble", str(folder / "asm.pt"), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder))
    return torch.load(folder / "asm.pt")


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
    assert 64 < max(run["counts"]) <= run["capacity"] == 128
    if which == "falling":
        assert run["counts"][2:] == [7] * (len(run["counts"]) - 2)


@needs_triton
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


@needs_triton
@pytest.mark.parametrize("compiled", COMPILED, ids=str)
def test_compiles_for_a_gpu_with_every_operation_rounded(assembly, compiled):
    _, dtype, formula = compiled
    kernels = assembly[repr(compiled)]
    assert sorted(name for name, _ in kernels) == ["_append_kernel", "_cut_kernel"]  # one version serves all sizes
    append, cut = (dict(kernels)[name] for name in ("_append_kernel", "_cut_kernel"))
    assert not re.search(r"\bfma|\.ftz|\.approx|div\.full", append)
    each = 2048 // 128  # the entries of a thread
    divisions = {"d3": 2 if formula.power == -1 else 1}.get(formula.kind, 0)
    assert len(re.findall(r"div\.rn\.f32", append)) == divisions * each
    read = each * dtype.itemsize + each * {"gradient": 0, "given": 4}.get(formula.kind, dtype.itemsize)
    assert len(re.findall(r"ld\.global\.v4\.b32", append)) == read // 16  # all in loads of 16 bytes
    assert re.search(r"atom.*add", append)
    assert "bar.sync" in cut


@needs_triton
def test_compiles_for_far_positions_and_odd_sizes(assembly):
    assert [name for name, _ in assembly[repr("odd")]] == ["_append_kernel"] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name, case in cases().items() if case.small and case.given != "rows"])
def test_on_a_gpu(name, monkeypatch):
    for size in ("_APPENDED", "_READ", "_LEAST"):
        monkeypatch.setattr(triton_buffer, size, 128)
    assert available(torch.device("cuda"))
    first, second = cases()[name].rank("cuda"), cases()[name].rank("cuda")
    assert_same(first, cases()[name].reference())
    assert_same(second, Ranked(*(column.cpu() for column in first)))


def test_without_triton_nothing_is_available():
    code = "import sys, torch\nsys.modules['triton'] = None\nfrom unmask.ranking.triton_buffer import available\n"
    python("-c", code + "assert not available(torch.device('cpu'))", TRITON_INTERPRET="1")


def test_kernels_that_do_not_run_are_not_used_and_a_warning_says_so(monkeypatch):
    def fails() -> None:
        raise RuntimeError("no compiler")

    triton_buffer._works.cache_clear()
    monkeypatch.setattr(triton_buffer, "kernels", fails)
    with pytest.warns(UserWarning, match="Triton does not rank on meta, plain torch is used instead: no compiler"):
        assert not triton_buffer._works(torch.device("meta"))
    triton_buffer._works.cache_clear()


if __name__ == "__main__":
    {"interpret": interpret, "assemble": assemble}[sys.argv[1]](sys.argv[2])
