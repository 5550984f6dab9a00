"""Tests how one row is built and trained, on a model of a few thousand weights. No assertion is about a time."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from bench_tiny import BUDGET, settings_for, write_config

from unmask.errors import ConfigError
from unmask.lab.bench.contenders import Clock, build, shira_rank, state_bytes
from unmask.lab.bench.models import blueprint
from unmask.lab.bench.rows import RAMP, Row, mid_run
from unmask.lab.bench.run import measure_apart
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.shapes import SHAPES, SIZES
from unmask.lab.bench.worker import measure
from unmask.methods.presets import id3

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant:UserWarning", "ignore:.*is_gradient_check:FutureWarning"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("tiny") / "tinybert")


def test_shapes_are_those_of_the_models_they_are_named_after():
    counts = {name: blueprint(BenchSettings(model=name)).describe()["parameters"] for name in SHAPES}
    sizes = [counts.pop(shape.name) for shape in SIZES]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (11_171_074, 956_646_914)
    assert counts == {
        "roberta-base": 124_647_170,  # its head has two classes
        "minilm": 22_713_986,
        "mpnet": 109_488_002,
        "smollm2": 134_515_008,
        "llama-1b": 1_235_814_400,
        "llama-7b": 6_738_415_616,
    }


def test_models_that_cannot_be_built_are_refused(tmp_path, folder):
    with pytest.raises(ConfigError, match="not in the local hub cache"):
        blueprint(BenchSettings(model="nobody/no-such-model"))
    with pytest.raises(ConfigError, match="no readable config"):
        blueprint(BenchSettings(model=str(tmp_path)))
    with pytest.raises(ConfigError, match="at most 32 positions"):
        blueprint(BenchSettings(model=str(folder), seq_len=64))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            blueprint(BenchSettings(model=str(folder), seq_len=8, device="cuda"))


def test_all_rows_start_from_the_same_weights_and_see_the_same_batches(folder, tmp_path):
    plan = blueprint(settings_for(folder, tmp_path))
    first, second = plan.build(), plan.build()
    assert first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    pairs = zip(plan.batches(), plan.batches(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)
    ids = plan.batches()[0]["input_ids"]
    assert ids.shape == (2, 8)
    assert not torch.equal(ids, plan.batches()[1]["input_ids"])
    other = blueprint(dataclasses.replace(settings_for(folder, tmp_path), seed=1))
    assert not torch.equal(ids, other.batches()[0]["input_ids"])


@pytest.mark.parametrize("dropout", [None, 0.0, 0.3])
def test_dropout_is_that_of_the_config_or_of_the_settings(folder, tmp_path, dropout):
    plan = blueprint(settings_for(folder, tmp_path, dropout=dropout))
    found = {module.p for module in plan.build().modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {0.1 if dropout is None else dropout}
    assert plan.describe()["dropout"]["hidden_dropout_prob"] == (0.1 if dropout is None else dropout)


def test_the_frozen_row_goes_back_to_the_embeddings_and_forms_no_weight_gradient(folder, tmp_path):
    settings = settings_for(folder, tmp_path, methods="frozen")
    plan = blueprint(settings)
    contender = build(settings.rows()[0], plan, settings)
    outputs = []
    contender.model.get_input_embeddings().register_forward_hook(lambda module, args, output: outputs.append(output))
    time = contender.step(plan.batches()[0], autocast=False)
    assert outputs[0].grad.abs().sum() > 0
    assert all(p.grad is None for p in contender.model.parameters())
    assert (time.optimizer, state_bytes(contender.optimizer)) == (0.0, 0)


def test_a_step_trains_and_leaves_no_gradient_behind(folder, tmp_path):
    settings = settings_for(folder, tmp_path, methods="full,lora,authors,static,id3")
    plan = blueprint(settings)
    for row in settings.rows():
        contender = build(row, plan, settings)
        held = [p for group in contender.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in held]
        for batch in plan.batches()[:2]:
            contender.step(batch, autocast=False)
        assert all(p.grad is None for p in [*held, *contender.model.parameters()]), row.label
        assert not all(torch.equal(a, b) for a, b in zip(before, held, strict=True)), row.label


@pytest.mark.parametrize(("row", "dtype"), [("lora", "float32"), ("lora-cast", "bfloat16")])
def test_the_adapters_of_a_model_in_bfloat16_are_in_float32_or_as_the_model(folder, tmp_path, row, dtype):
    settings = settings_for(folder, tmp_path, methods=row, dtype="bf16")
    plan = blueprint(settings)
    contender = build(settings.rows()[0], plan, settings)
    contender.step(plan.batches()[0], autocast=False)
    assert contender.facts["adapter_dtype"] == dtype
    assert {str(p.dtype)[6:] for p in contender.model.parameters() if p.requires_grad} == {dtype}


def test_cuda_events_time_the_phases_and_the_cpu_waits_once(monkeypatch):
    waits, clock = [], iter([10.0, 15.0, 45.0])  # in milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def synchronize(self):
            waits.append("the last event")

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: waits.append("earlier work"))
    timer = Clock(torch.device("cuda"))
    timer.mark()
    timer.mark()
    assert timer.seconds() == [0.005, 0.03]
    assert waits == ["earlier work", "the last event"]


@pytest.mark.parametrize("dtype", ["autocast", "bf16"])
def test_every_row_runs_in_half_precision(folder, tmp_path, dtype):
    settings = settings_for(folder, tmp_path, dtype=dtype, steps=1)
    plan = blueprint(settings)
    assert next(plan.build().parameters()).dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    batch = plan.batches()[0]
    for row in settings.rows():
        assert build(row, plan, settings).step(batch, dtype == "autocast").backward > 0, row.label


@pytest.mark.slow
def test_a_fresh_process_measures_the_same_row_and_only_its_own_memory(folder, tmp_path):
    settings = settings_for(folder, tmp_path, methods="id3-10")
    row = settings.rows()[0]
    ballast = torch.ones(2**28)  # This GiB must not count in the other process.
    there, here = measure_apart(settings, row), measure(settings, row)
    del ballast
    assert there["weights"] == here["weights"]
    assert [step["selecting"] for step in there["steps"]] == [step["selecting"] for step in here["steps"]]
    assert there["memory"]["before_mb"] <= there["memory"]["peak_mb"] < 1_000 < here["memory"]["peak_mb"]
    assert there["memory"]["saved_bytes"] == here["memory"]["saved_bytes"]


@pytest.mark.slow
def test_a_row_that_cannot_be_built_is_reported_as_an_error_by_its_process(folder, tmp_path):
    settings = settings_for(folder, tmp_path, methods="shira")
    elsewhere = dataclasses.replace(settings, model=str(tmp_path / "nothing/here"))
    assert measure_apart(elsewhere, settings.rows()[0])["error"].startswith("ConfigError: model")


def test_a_killed_process_has_another_reason_than_one_that_failed(folder, tmp_path, monkeypatch):
    settings = settings_for(folder, tmp_path, methods="static")
    row, program = settings.rows()[0], tmp_path / "python"
    monkeypatch.setattr("unmask.lab.bench.run.sys.executable", str(program))
    for script, reason in (
        ("kill -9 $$", "the process was killed by signal 9 (out of memory?)"),
        ("echo Traceback >&2; echo ValueError: no >&2; exit 1", "ValueError: no"),
        ("exit 3", "exit status 3"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert measure_apart(settings, row) == {"error": reason}


@pytest.mark.parametrize("kind", ["id3", "id3-10", "id3-100"])
@pytest.mark.parametrize("budget", [20, 1_000, 320_000])
@pytest.mark.parametrize(("warmup", "steps"), [(1, 1), (2, 3), (5, 40)])
def test_id3_is_timed_around_half_of_its_budget(kind, budget, warmup, steps):
    row = Row(kind, kind, budget)
    schedule = mid_run(row, warmup, steps)
    count = RAMP + warmup + row.cycle * row.cycles(steps)
    method = id3(budget, count + 1, schedule=schedule)
    method.schedule.check(budget)
    counts = [method.cumulative(t, budget) for t in range(count)]
    ramp, timed = counts[:RAMP], counts[RAMP + warmup :]
    assert ramp[-1] == schedule.start
    assert all(b - a <= schedule.start / RAMP + 1 for a, b in itertools.pairwise(ramp))
    middle = (counts[RAMP] + counts[-1]) / 2
    assert abs(middle - budget / 2) <= max(0.06 * budget, row.stride * budget / 1_000 + 1)
    assert counts[-1] - schedule.start == schedule.total <= 0.8 * budget
    before = [counts[RAMP + warmup - 1], *timed]
    marks = [b > a for a, b in zip(before, timed, strict=False)]
    if schedule.total >= schedule.cycles:  # Then every cycle selects, at its first step.
        assert marks == ([True] + [False] * (row.cycle - 1)) * row.cycles(steps)
    if budget >= 1_000:  # A cycle unmasks as much as a run of 1,000 steps does, unless that is too much in all.
        share = min(budget * row.stride / 1_000, 0.8 * budget / schedule.cycles)
        assert all(int(share) <= b - a <= share + 1 for a, b in zip(before, timed, strict=False) if b > a)


def test_a_cycle_of_a_long_stride_is_short():
    assert [Row(k, k, 1).cycle for k in ("static", "id3", "id3-7", "id3-10", "id3-100")] == [1, 1, 7, 10, 4]
    assert [Row(k, k, 1).cycles(10) for k in ("static", "id3-7", "id3-10", "id3-100")] == [10, 2, 1, 3]


def test_shira_takes_the_nearest_rank_and_leaves_out_layers_without_room():
    layers = {"wide": (768, 3072), "square": (768, 768), "out": (768, 2)}
    assert shira_rank(layers, 3840 + 1536 + 770) == (1, ["wide", "square", "out"])
    assert shira_rank(layers, 11_000) == (2, ["wide", "square"])
    # Ranks 2 and 3 train 10,752 and 16,128 weights: the third is nearer, by 2,628 to 2,748.
    assert shira_rank(layers, 13_500) == (3, ["wide", "square"])
    with pytest.raises(ConfigError, match="rank 1"):
        shira_rank({"thin": (1, 8)}, 5)


def test_a_tiny_row_is_measured_around_the_middle_of_its_budget(folder, tmp_path):
    settings = settings_for(folder, tmp_path, methods="id3,id3-10,id3-100")
    for row in settings.rows():
        report = measure(settings, row)
        assert BUDGET // 2 <= report["weights"]["trained"] <= 0.9 * BUDGET, row.label
        assert len(report["steps"]) == row.cycle * row.cycles(settings.steps), row.label
