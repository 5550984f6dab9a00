"""Runs the Triton kernel of the sampled product by Triton's interpreter, and compiles it for absent GPUs.

The interpreter must be chosen before triton is imported, so this file is also the script that runs the cases in another
process; the tests compare what it saved.
"""

from __future__ import annotations

import collections
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import types
import zlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from unmask import SelectionError
from unmask.gradients import triton_sampled
from unmask.gradients.triton_sampled import DTYPES, available, triton_sampled_product

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not INSTALLED, reason="triton is not installed: pip install --no-deps -r requirements-test.txt"
)
EPS = torch.finfo(torch.float32).eps
GPUS = (("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64))


class Case(NamedTuple):
    """The operands of one product."""

    g: Tensor
    x: Tensor
    rows: Tensor
    columns: Tensor


def integers(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Returns integers from -8 to 8: products and sums are exact in float32, in any order."""
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def make(
    tokens: int,
    out: int,
    width: int,
    m: int,
    dtype: torch.dtype = torch.float32,
    draw: Callable[[tuple[int, ...], torch.Generator, torch.dtype], Tensor] = normal,
) -> Case:
    generator = torch.Generator().manual_seed(zlib.crc32(repr((tokens, out, width, m)).encode()))
    flat = torch.randint(out * width, (m,), generator=generator).sort().values  # duplicates may occur
    return Case(
        draw((tokens, out), generator, dtype), draw((tokens, width), generator, dtype), flat // width, flat % width
    )


SHAPES = {  # T, out, in, m
    "one of each": (1, 1, 1, 1),
    "one token": (1, 70, 90, 40),
    "one entry": (300, 70, 90, 1),
    "one output": (50, 1, 90, 33),
    "a block of entries": (40, 64, 64, 16),
    "below a block": (127, 30, 65, 17),
    "blocks of tokens": (256, 30, 64, 15),
    "above a block": (257, 30, 63, 31),
    "more entries than weights": (60, 5, 7, 100),
    "a chunk and a token": (2049, 20, 130, 40),
    "three chunks": (4100, 20, 9, 20),
    "no entry": (5, 3, 4, 0),
    "no token": (0, 3, 4, 6),
}


def layouts() -> dict[str, Case]:
    """Returns the same values in other layouts: every one must give the bits of ``plain``."""
    plain = make(150, 40, 70, 50)
    g, x, rows, columns = plain
    spread = torch.stack([x, x + 1], dim=2)[..., 0]  # every other element
    shifted = torch.cat([g.new_ones(1), g.flatten()])[1:].view_as(g)  # not aligned to 16 bytes
    return {
        "plain": plain,
        "token-contiguous": Case(g.t().contiguous().t(), x.t().contiguous().t(), rows, columns),
        "spread": Case(g, spread, rows, columns),
        "shifted": Case(shifted, x, rows, columns),
        "int32": Case(g, x, rows.int(), columns.int()),
        "mixed indices": Case(g, x, rows, columns.int()),
        "strided indices": Case(g, x, torch.stack([rows, columns], dim=1)[:, 0], columns),
        "with gradients": Case(g.clone().requires_grad_(), x.clone().requires_grad_(), rows, columns),
    }


def spoilt() -> dict[str, Case]:
    """Returns operands with an infinite and an undefined number, and the same without."""
    clean = make(200, 20, 30, 120)
    g, x = clean.g.clone(), clean.x.clone()
    g[5, 3], x[7, 2] = torch.inf, torch.nan
    return {"clean": clean, "spoilt": clean._replace(g=g, x=x)}


def special() -> dict[str, Case]:
    at = torch.tensor([0])
    full = Case(torch.full((3, 1), 300.0).half(), torch.full((3, 1), 300.0).half(), at, at)
    tiny = Case(torch.full((4, 1), 2.0**-14).half(), torch.full((4, 1), 2.0**-14).half(), at, at)
    fine = Case(torch.full((1, 1), 1 + 2.0**-20), torch.full((1, 1), 1 + 2.0**-21), at, at)
    many = Case(torch.ones(6000, 1).bfloat16(), torch.ones(6000, 1).bfloat16(), at, at)
    same = make(70, 6, 9, 1)
    far = torch.empty(2**31 + 2, dtype=torch.bfloat16).as_strided((3, 2), (2**30, 1))  # Only 6 elements are touched.
    far.copy_(torch.arange(6.0).view(3, 2))
    return {
        "overflows float16": full,
        "underflows float16": tiny,
        "needs float32 products": fine,
        "stalls in bfloat16": many,
        "beyond 2**31 elements": Case(far, make(3, 2, 4, 1).x.bfloat16(), at + 1, at),
        "one row": Case(*make(90, 30, 40, 1)[:2], torch.full((40,), 17), torch.arange(40)),
        "one column": Case(*make(90, 40, 30, 1)[:2], torch.arange(40), torch.full((40,), 17)),
        "duplicates": same._replace(rows=same.rows.expand(20), columns=same.columns.expand(20)),
        "expanded": Case(torch.ones(1, 1).expand(90, 8), make(90, 8, 8, 1).x, torch.arange(8), torch.arange(8)),
    }


def parts() -> dict[str, Case]:
    """Returns parts of the entries of one case."""
    whole = make(300, 50, 60, 100)
    picks = {
        "all": slice(None),
        "first": slice(1),
        "odd": slice(1, None, 2),
        "inner": slice(5, 38),
        "last": slice(99, 100),
    }
    return {name: whole._replace(rows=whole.rows[pick], columns=whole.columns[pick]) for name, pick in picks.items()}


def cases() -> dict[str, Case]:
    """Returns every case by group and name."""
    groups = {"layouts": layouts(), "spoilt": spoilt(), "special": special(), "parts": parts()}
    found = {f"{group}: {name}": case for group, named in groups.items() for name, case in named.items()}
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            found[f"normal: {name}, {dtype}"] = make(*shape, dtype)
            found[f"integers: {name}, {dtype}"] = make(*shape, dtype, integers)
    return found


class Grid:
    """Stands for a kernel: ``kernel[grid]`` is what a function makes of the grid."""

    def __init__(self, launcher: Callable[[object], object]) -> None:
        self.launcher = launcher

    def __getitem__(self, grid: object) -> object:
        return self.launcher(grid)


def shared() -> tuple[list[Tensor], list[int]]:
    """Returns the products of three layers with one input, then of one with another; and how many blocks each copied."""
    triton_sampled.last_transposed.forget()
    first, other = make(150, 40, 70, 50), make(150, 40, 70, 51)
    operands = [first, first._replace(g=first.g + 1), first._replace(g=first.g * 2), other]
    kernels, copied = triton_sampled._kernels(), []
    spied = Grid(lambda grid: copied.append(grid) or kernels[0][grid])
    triton_sampled._kernels = lambda: (spied, kernels[1])
    results = [triton_sampled_product(*case) for case in operands]
    triton_sampled._kernels = lambda: kernels
    return results, [grid[0] for grid in copied]


def interpret(path: str) -> None:
    """Runs every case, some twice or in the smallest chunks too, and saves the results and the sizes of the copies."""
    known, held = cases(), []
    plain = Tensor.new_empty
    Tensor.new_empty = lambda self, *size, **options: held.append(size) or plain(self, *size, **options)
    runs: dict[str, object] = {"available": available("cpu")}
    runs["once"] = {name: triton_sampled_product(*case) for name, case in known.items()}
    runs["again"] = {name: triton_sampled_product(*known[name]) for name in known if name.startswith("normal")}
    runs["held"] = max(size[1] for size in held if len(size) == 2)
    held.clear()
    runs["shared"], runs["blocks"] = shared()
    triton_sampled._COPY = 1
    runs["small"] = {name: triton_sampled_product(*known[name]) for name in known if "above a block" in name}
    runs["small held"] = max(size[1] for size in held if len(size) == 2)
    torch.save(runs, path)


def assemble(path: str) -> None:
    """Compiles the kernels for each GPU and dtype by way of the real calls, up to the launch, and saves the assembly."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    found: dict[tuple[object, ...], list[tuple[str, str]]] = collections.defaultdict(list)
    original, seen = JITFunction.run, set()

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found[key].append((self.__name__, kernel.asm.get("ptx") or kernel.asm["amdgcn"]))

    JITFunction.run = run
    driver = types.SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    for gpu in GPUS:
        driver.get_current_target = types.MethodType(lambda target: target, GPUTarget(*gpu))
        triton.runtime.driver.set_active(driver)
        triton_sampled._kernels.cache_clear()
        for dtype in DTYPES:
            key = (gpu[0], gpu[1], dtype)
            for tokens, m in ((1, 1), (16, 16), (255, 7), (4099, 1000)):
                triton_sampled._product(*make(tokens, 32, 64, m, dtype))
    torch.save(dict(found), path)


def python(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("interpreted") / "runs.pt")
    python(__file__, "interpret", path, TRITON_INTERPRET="1")
    return torch.load(path)


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    python(__file__, "assemble", str(folder / "asm.pt"), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder))
    return torch.load(folder / "asm.pt")


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """Returns the product in float64, and the sum of its terms' sizes."""
    left, right = case.g.detach().double()[:, case.rows], case.x.detach().double()[:, case.columns]
    return (left * right).sum(0), (left * right).abs().sum(0)


def assert_exact(result: Tensor, case: Case) -> None:
    expected, size = reference(case)
    assert result.dtype == torch.float32
    assert result.shape == case.rows.shape
    error = (result.double().cpu() - expected).abs()
    assert (error <= 24 * EPS * size).all(), (error / size).max() / EPS


@needs_triton
def test_the_interpreter_counts_as_available(runs):
    assert runs["available"] is True


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(runs, shape, dtype):
    assert_exact(runs["once"][f"normal: {shape}, {dtype}"], make(*SHAPES[shape], dtype))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_small_integers_are_exact(runs, shape, dtype):
    expected, _ = reference(make(*SHAPES[shape], dtype, integers))
    assert torch.equal(runs["once"][f"integers: {shape}, {dtype}"].double(), expected)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_very_wide_operands_are_copied_fewer_tokens_at_a_time(runs, dtype):
    assert (runs["held"], runs["small held"]) == (2048, 256)
    assert_exact(runs["small"][f"normal: above a block, {dtype}"], make(*SHAPES["above a block"], dtype))
    exact = f"integers: above a block, {dtype}"
    assert torch.equal(runs["small"][exact], runs["once"][exact])


@needs_triton
def test_layers_with_one_input_copy_it_once(runs):
    first, other = make(150, 40, 70, 50), make(150, 40, 70, 51)
    for result, case in zip(
        runs["shared"], [first, first._replace(g=first.g + 1), first._replace(g=first.g * 2), other], strict=True
    ):
        assert_exact(result, case)
    assert runs["blocks"] == [3, 1, 1, 3]  # of 64 columns: one of g, and two of x where it is new


@needs_triton
def test_repeated_runs_give_the_same_bits(runs):
    assert len(runs["again"]) == len(SHAPES) * len(DTYPES)
    for name, second in runs["again"].items():
        assert torch.equal(second.view(torch.int32), runs["once"][name].view(torch.int32)), name


@needs_triton
@pytest.mark.parametrize("layout", layouts())
def test_strides_and_index_dtypes_do_not_matter(runs, layout):
    result = runs["once"][f"layouts: {layout}"]
    assert_exact(result, layouts()[layout])
    assert torch.equal(result, runs["once"]["layouts: plain"])
    assert not result.requires_grad


@needs_triton
@pytest.mark.parametrize("name", special())
def test_special_values_and_places(runs, name):
    case, result = special()[name], runs["once"][f"special: {name}"]
    assert_exact(result, case)
    if len(case.rows) == 1:  # These are chosen so that float32 rounds the result once at most.
        assert result.item() == reference(case)[0].float().item()


@needs_triton
def test_a_number_that_is_not_finite_stays_in_its_row_and_column(runs):
    case = spoilt()["spoilt"]
    hit = (case.rows == 3) | (case.columns == 2)
    assert 0 < hit.sum() < len(hit)
    result, clean = runs["once"]["spoilt: spoilt"], runs["once"]["spoilt: clean"]
    assert torch.equal(result[~hit], clean[~hit])
    assert result[case.columns == 2].isnan().all()
    assert result[(case.rows == 3) & (case.columns != 2)].isinf().all()


@needs_triton
@pytest.mark.parametrize(("name", "pick"), [("first", slice(1)), ("odd", slice(1, None, 2)), ("inner", slice(5, 38))])
def test_an_entry_does_not_depend_on_the_others(runs, name, pick):
    assert torch.equal(runs["once"][f"parts: {name}"], runs["once"]["parts: all"][pick])
    assert torch.equal(runs["once"]["parts: last"], runs["once"]["parts: all"][-1:])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu[1]))
def test_compiles_without_atomics_or_tensor_cores(assembly, gpu, dtype):
    """Checks that one version per dtype serves all T and m: the order of the additions cannot change between calls."""
    kernels = collections.defaultdict(list)
    for name, text in assembly[(gpu[0], gpu[1], dtype)]:
        kernels[name].append(text)
    assert set(kernels) == {"_transpose_kernel", "_sample_kernel"}
    assert len(kernels["_sample_kernel"]) == len(kernels["_transpose_kernel"]) == 1
    text = "".join(text for versions in kernels.values() for text in versions)
    assert not re.search(r"\b(atom|red)\.|atomic|\bw?g?mma|mfma|tf32", text)
    wide = r"ld\.global\.v4\.b32" if gpu[0] == "cuda" else r"(?:global|buffer)_load_dwordx4"  # 16 bytes per thread
    bytes_read = {
        "_sample_kernel": 2 * 16 * 512,
        "_transpose_kernel": 2 * 64 * 64 * dtype.itemsize,  # of g or of x
    }  # per block
    for name, count in bytes_read.items():
        assert len(re.findall(wide, kernels[name][0])) == count // (16 * 4 * gpu[2]), name
    assert re.search(r"fma\.rn\.f32|fma_f32|fmac_f32", kernels["_sample_kernel"][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("draw", [normal, integers])
def test_on_a_gpu(draw):
    assert available("cuda")
    for shape, dtype in itertools.product(SHAPES.values(), DTYPES):
        case = make(*shape, dtype, draw)
        there = Case(*(tensor.cuda() for tensor in case))
        result = triton_sampled_product(*there)
        assert_exact(result, case)
        assert torch.equal(result, triton_sampled_product(*there))
        assert draw is normal or torch.equal(result.double().cpu(), reference(case)[0])


G, X, AT = torch.ones(3, 2), torch.ones(3, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((G[0], X, AT, AT), r"float32 \(2,\) on cpu, .*shapes must be \(T, out\), \(T, in\), \(m,\) and \(m,\)"),
        ((G[:2], X, AT, AT), "shapes must be"),
        ((G, X, AT, AT[:1]), "shapes must be"),
        ((G, X, AT[None], AT[None]), "shapes must be"),
        ((G.double(), X.double(), AT, AT), "float64 .* need one of"),
        ((G.half(), X, AT, AT), "need one of"),
        ((G, X, AT.float(), AT), "the others an integer"),
        ((G, X.to("meta"), AT, AT), "on meta, .* move them to one device"),
        (tuple(v.to("meta") for v in (G, X, AT, AT)), "does not run on 'meta'; ask available"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(SelectionError, match=message):
        triton_sampled_product(*arguments)


IMPORT = "import sys\nfrom unmask.gradients import triton_sampled as ts\n"
FAILING = (
    IMPORT
    + """
import warnings
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert not ts.available("cpu") and not ts.available("cpu")
assert [str(w.message) for w in caught] == ["Triton does not run on cpu, plain torch is used instead: no driver"], caught
"""
)


def test_triton_is_not_imported_before_it_is_used():
    code = "assert not ts.available('cpu') and not ts.available('meta')\nassert 'triton' not in sys.modules"
    python("-c", IMPORT + code, TRITON_INTERPRET="")


def test_without_triton_nothing_is_available():
    python("-c", IMPORT + "sys.modules['triton'] = None\nassert not ts.available('cpu')", TRITON_INTERPRET="1")


def test_a_triton_that_does_not_run_is_not_used_and_a_warning_says_so(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise RuntimeError('no driver')")
    python("-c", FAILING, str(tmp_path), TRITON_INTERPRET="1")


if __name__ == "__main__":
    {"interpret": interpret, "assemble": assemble}[sys.argv[1]](sys.argv[2])
