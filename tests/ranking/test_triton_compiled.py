"""Compiles the ranking's Triton kernels for GPUs that are not there, and reads the assembly; says where they are not used."""

from __future__ import annotations

import collections
import re
import sys
import types

import pytest
import torch
from ranking_cases import FORMULAS
from triton_runs import needs_triton, python

from unmask.ranking import triton_buffer
from unmask.ranking.triton_buffer import GIVEN, BestBuffer, Formula, Sizes
from unmask.ranking.triton_ranker import formula_of

COMPILED = [  # compute capability, dtype, formula
    *((90, torch.bfloat16, formula) for formula in (*map(formula_of, FORMULAS[:3]), Formula("d3", 0.5, 2), GIVEN)),
    *(
        (gpu, dtype, Formula("d3", 0.5, 2))
        for gpu, dtype in ((90, torch.float32), (90, torch.float16), (80, torch.bfloat16))
    ),
]


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


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    python(__file__, str(folder / "asm.pt"), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder))
    return torch.load(folder / "asm.pt")


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


def test_without_triton_nothing_is_available():
    code = "import sys, torch\nsys.modules['triton'] = None\nfrom unmask.ranking.triton_buffer import available\n"
    python("-c", code + "assert not available(torch.device('cpu'))", TRITON_INTERPRET="1")


class Launched:
    """A kernel that does nothing, or fails."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return self

    def __call__(self, *arguments: object, **options: object) -> None:
        if self.fails:
            raise RuntimeError("no compiler")


@pytest.mark.parametrize(("fails", "why"), [(True, "no compiler"), (False, "scores below the smallest normal number")])
def test_kernels_that_do_not_run_or_rank_wrongly_are_not_used_and_a_warning_says_so(fails, why, monkeypatch):
    triton_buffer._works.cache_clear()
    monkeypatch.setattr(triton_buffer, "kernels", lambda: (Launched(fails), Launched(fails)))
    with pytest.warns(UserWarning, match=f"Triton does not rank on cpu, plain torch is used instead: {why}"):
        assert not triton_buffer._works(torch.device("cpu"))
    triton_buffer._works.cache_clear()


if __name__ == "__main__":
    assemble(sys.argv[1])
