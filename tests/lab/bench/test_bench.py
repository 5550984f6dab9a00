"""The benchmark as a whole, on a model of a few thousand weights. No assertion is about a time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bench_tiny import BUDGET, LINEAR, settings_for, write_config

from unmask.errors import ConfigError
from unmask.lab.bench import builders, memory, runner
from unmask.lab.bench.builders import build
from unmask.lab.bench.contender import Contender, state_bytes
from unmask.lab.bench.lanes import LaneError, LocalLane, RemoteLane, cycles_of
from unmask.lab.bench.models import blueprint
from unmask.lab.bench.ours import mid_run
from unmask.lab.bench.rows import KINDS
from unmask.lab.bench.runner import run_bench

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant:UserWarning", "ignore:.*is_gradient_check:FutureWarning"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("tiny") / "tinybert")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """(settings, record, output folder, progress) of a run of every row, memory measured in this process."""
    output, said = tmp_path_factory.mktemp("bench"), []
    settings = settings_for(folder, output, memory=True)
    patch = pytest.MonkeyPatch()
    with patch.context() as p:
        p.setattr(runner, "measure", memory.run)
        record = run_bench(settings, said.append, command="unmask bench")
    return settings, record, output, said


def test_every_row_is_measured(whole):
    _, record, _, said = whole
    assert list(record["rows"]) == list(KINDS)
    assert {row["status"] for row in record["rows"].values()} == {"ok"}
    assert record["complete"]
    assert record["grouping"]["interleaved"]
    assert sum("round" in line for line in said) == 3


def test_the_record_is_what_the_folder_holds(whole):
    _, record, output, _ = whole
    assert json.loads((output / "bench.json").read_text()) == json.loads(json.dumps(record))
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert record["model"]["dropout"]["hidden_dropout_prob"] == 0.1
    assert record["machine"]["threads"] == 1
    assert record["machine"]["versions"]["torch"] == torch.__version__


def test_figures_agree_with_the_raw_steps(whole):
    settings, record, _, _ = whole
    for label, row in record["rows"].items():
        per_round = row["cycle"] if row["stride"] > 1 else settings.steps
        assert len(row["steps"]) == settings.rounds * per_round, label
        for step in row["steps"]:
            assert step["total"] == pytest.approx(step["forward"] + step["backward"] + step["optimizer"])
        totals = sorted(step["total"] for step in row["steps"])
        middle = (totals[(len(totals) - 1) // 2] + totals[len(totals) // 2]) / 2
        assert row["timing"]["total"]["median"] == pytest.approx(middle)
        assert row["timing"]["tokens_per_second"] == pytest.approx(2 * 8 / middle)
        floor = record["rows"]["frozen"]["timing"]["total"]["median"]
        assert row["ratios"]["frozen"]["ratio"] == pytest.approx(middle / floor)


def test_only_strided_rows_select_now_and_then(whole):
    _, record, _, _ = whole
    rows = record["rows"]
    marks = {label: [step["selecting"] for step in rows[label]["steps"]] for label in rows}
    assert marks["id3-10"] == ([True] + [False] * 9) * 2
    assert marks["id3-100"] == ([True] + [False] * 3) * 2
    assert all(marks["id3"])
    assert not any(marks["static"] + marks["static-d3"] + marks["lora"])
    assert {label for label in rows if "amortised" in rows[label]["timing"]} == {"id3-10", "id3-100"}


def test_trained_weights_are_counted(whole):
    settings, record, _, _ = whole
    weights = {label: row["weights"] for label, row in record["rows"].items()}
    total = record["model"]["parameters"]
    assert weights["full"]["trained"] == weights["full-fused"]["trained"] == total
    assert weights["frozen"]["trained"] == 0
    assert weights["static"]["trained"] == weights["static-d3"]["trained"] == BUDGET
    assert weights["lora"]["trained"] == sum(8 * (a + b) for a, b in LINEAR)
    assert weights["shira"]["trained"] == sum(a + b for a, b in LINEAR)  # rank 1 is the nearest to 200
    density = BUDGET / sum(a * b for a, b in LINEAR)
    assert weights["super"]["trained"] == sum(int(a * b * density) for a, b in LINEAR)
    assert weights["authors"]["trained"] == 3 * settings.steps  # one weight a step, warm-up included
    for row in settings.rows():
        if row.kind.startswith("id3"):
            cycles = cycles_of(row, settings)
            assert weights[row.label]["trained"] == mid_run(row, cycles)(row.cycle * cycles - 1, 0, BUDGET)


def test_memory_figures(whole):
    _, record, _, _ = whole
    memories = {label: row["memory"] for label, row in record["rows"].items()}
    total = record["model"]["parameters"]
    tensors = sum(1 for _ in blueprint(whole[0]).build().parameters())
    assert memories["full"]["state_bytes"] == 2 * 4 * total + 4 * tensors
    assert memories["static"]["state_bytes"] == 2 * 4 * BUDGET + 4
    assert memories["authors"]["state_bytes"] == 2 * 4 * total + 4 * tensors + total  # and a mask of bytes
    assert memories["full"]["saved_bytes"] == 4 * total
    assert memories["frozen"]["saved_bytes"] is None
    for row in whole[0].rows():
        if row.kind.startswith("id3"):  # half of the budget from the ramp, and what its cycles unmask
            assert BUDGET // 2 <= memories[row.label]["trained"] <= 0.9 * BUDGET
            assert memories[row.label]["steps"] == max(3, row.cycle + 1)
    for label, figures in memories.items():
        assert figures["peak_mb"] >= figures["before_mb"] > 0, label
        if label != "frozen":
            assert figures["bytes_per_weight"] == figures["saved_bytes"] / figures["trained"], label


def test_the_page_has_a_line_per_row_and_says_why_no_bars(whole):
    _, record, output, _ = whole
    page = (output / "bench.md").read_text()
    for label in record["rows"]:
        assert page.count(f"| {label} |") == 2, label
    assert "The bars do not apply to this run: model is" in page
    assert record["verdicts"]["bars"] == []


def test_bars_are_judged_where_they_apply(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("unmask.lab.bench.record.off_reference", lambda *given: [])
    record = run_bench(settings_for(folder, tmp_path, methods="frozen,static", rounds=1), lambda line: None)
    first = record["verdicts"]["bars"][0]
    assert (first["row"], first["against"]) == ("static", "frozen")
    assert first["measured"] == record["rows"]["static"]["ratios"]["frozen"]["ratio"]
    assert {entry["verdict"] for entry in record["verdicts"]["bars"][1:]} == {"not measured"}
    assert "| static | 1.05 |" in (tmp_path / "bench.md").read_text()


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


def test_the_frozen_floor_goes_back_to_the_embeddings_and_forms_no_weight_gradient(folder, tmp_path):
    settings = settings_for(folder, tmp_path, methods="frozen")
    plan = blueprint(settings)
    contender = build(settings.rows()[0], plan, settings, 1)
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
        contender = build(row, plan, settings, 1)
        held = [p for group in contender.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in held]
        for batch in plan.batches()[:2]:
            contender.step(batch, autocast=False)
        assert all(p.grad is None for p in [*held, *contender.model.parameters()]), row.label
        assert not all(torch.equal(a, b) for a, b in zip(before, held, strict=True)), row.label


@pytest.mark.parametrize("dtype", ["autocast", "bf16"])
def test_every_row_runs_in_half_precision(folder, tmp_path, dtype):
    settings = settings_for(folder, tmp_path, dtype=dtype, rounds=1, steps=1)
    plan = blueprint(settings)
    assert next(plan.build().parameters()).dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    record = run_bench(settings, lambda line: None)
    assert {label: row["reason"] for label, row in record["rows"].items() if row["status"] != "ok"} == {}


def test_a_missing_peer_is_named_and_the_rest_runs(folder, tmp_path, monkeypatch):
    real = builders.importlib.util.find_spec
    monkeypatch.setattr(
        builders.importlib.util, "find_spec", lambda n: None if n == "selective_optimizers" else real(n)
    )
    settings = settings_for(folder, tmp_path, methods="frozen,authors,static", rounds=1, memory=True)
    monkeypatch.setattr(runner, "measure", lambda settings, row: {"error": "not tried"})
    record = run_bench(settings, lambda line: None)
    assert record["rows"]["authors"]["status"] == "not installed"
    assert record["rows"]["authors"]["reason"] == "not installed: pip install 'unmask[bench]'"
    assert record["rows"]["authors"]["memory"] == {}
    assert [record["rows"][label]["status"] for label in ("frozen", "static")] == ["ok", "ok"]
    assert "authors: not installed" in (tmp_path / "bench.md").read_text()


def test_a_failing_row_is_reported_and_the_rest_runs(folder, tmp_path, monkeypatch):
    def broken(row, plan):
        raise RuntimeError("out of memory: tried to allocate 1 TB")

    real, calls = Contender.step, []

    def step(self, *args):
        if self.row.label == "static":
            calls.append(1)
            if len(calls) == 5:  # in its third round
                raise ValueError("went wrong in the middle")
        return real(self, *args)

    monkeypatch.setitem(builders._PEERS, "full", broken)
    monkeypatch.setattr(Contender, "step", step)
    record = run_bench(settings_for(folder, tmp_path, methods="frozen,full,static,id3"), lambda line: None)
    rows = record["rows"]
    assert rows["full"]["reason"] == "RuntimeError: out of memory: tried to allocate 1 TB"
    assert rows["static"]["reason"] == "ValueError: went wrong in the middle"
    assert rows["full"]["timing"] is rows["static"]["timing"] is None
    assert [rows[label]["status"] for label in rows] == ["ok", "failed", "failed", "ok"]
    assert len(rows["id3"]["steps"]) == 4
    assert "full" not in rows["id3"]["ratios"]


def test_a_killed_run_leaves_what_it_has(folder, tmp_path):
    def say(line):
        if "round 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(settings_for(folder, tmp_path, methods="frozen,static", rounds=5), say)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert not record["complete"]
    assert [len(row["steps"]) for row in record["rows"].values()] == [2, 2]  # one timed round
    assert record["rows"]["static"]["ratios"]["frozen"]["ratio"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # and no partial file


def test_rows_that_do_not_fit_together_run_in_groups_with_the_frozen_row(folder, tmp_path):
    settings = settings_for(folder, tmp_path, methods="frozen,full,static", rounds=1, isolate=True)
    record = run_bench(settings, lambda line: None)
    assert record["grouping"]["groups"] == [["frozen", "full"], ["frozen", "static"]]
    rows = record["rows"]
    assert [step["group"] for step in rows["frozen"]["steps"]] == [0, 0, 1, 1]
    found = rows["static"]["ratios"]
    assert found["full"]["through"] == "frozen"
    assert found["full"]["ratio"] == pytest.approx(found["frozen"]["ratio"] / rows["full"]["ratios"]["frozen"]["ratio"])


@pytest.mark.slow
def test_rows_in_processes_of_their_own_run_the_same_steps(folder, tmp_path):
    here, there = (
        run_bench(
            settings_for(folder, tmp_path / str(processes), methods="frozen,id3-10", rounds=1, processes=processes),
            lambda line: None,
        )
        for processes in (False, True)
    )
    assert (here["grouping"]["processes"], there["grouping"]["processes"]) == (False, True)
    for label, row in there["rows"].items():
        assert row["weights"] == here["rows"][label]["weights"]
        marks = [[(s["round"], s["selecting"]) for s in rows[label]["steps"]] for rows in (here["rows"], there["rows"])]
        assert marks[0] == marks[1]
        assert min(step["backward"] for step in row["steps"]) > 0


def test_every_draw_builds_the_rows_anew(folder, tmp_path, monkeypatch):
    built, said = [], []

    def counted(row, *given):
        built.append(row.label)
        if row.label == "full" and built.count("full") == 2:
            raise RuntimeError("out of something")
        return LocalLane(row, *given)

    monkeypatch.setattr("unmask.lab.bench.timed.LocalLane", counted)
    settings = settings_for(folder, tmp_path, methods="frozen,full,static", rounds=2, draws=3)
    record = run_bench(settings, said.append)
    assert [built.count(label) for label in ("frozen", "full", "static")] == [3, 2, 3]
    assert [step["round"] for step in record["rows"]["static"]["steps"]] == [r for r in range(6) for _ in range(2)]
    assert len(record["rows"]["static"]["ratios"]["frozen"]["rounds"]["each"]) == 6
    assert (record["rows"]["full"]["status"], record["rows"]["full"]["steps"]) == ("failed", [])  # not half a row
    assert [line.split("(")[1].split(")")[0] for line in said if "round" in line] == ["warm-up", "timed", "timed"] * 3
    assert "2 rounds in each of 3 draws" in (tmp_path / "bench.md").read_text()


@pytest.mark.slow
def test_a_row_whose_process_ends_says_how(folder, tmp_path):
    settings = settings_for(folder, tmp_path, methods="shira", rounds=1)
    with pytest.raises(LaneError, match="ConfigError: model"):
        RemoteLane(settings.rows()[0], dataclasses.replace(settings, model=str(tmp_path / "nothing/here")))
    lane = RemoteLane(settings.rows()[0], settings)
    lane._process.kill()
    with pytest.raises((LaneError, BrokenPipeError)):
        lane.stretch(0, 0)
    lane.close()


def test_what_is_too_large_is_skipped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("unmask.lab.bench.timed.available_bytes", lambda device: 1_000)
    record = run_bench(settings_for(folder, tmp_path, methods="frozen,static", rounds=1), lambda line: None)
    assert record["rows"]["static"]["status"] == "skipped"
    assert "GiB are free" in record["rows"]["static"]["reason"]


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(folder, tmp_path):
    settings = settings_for(folder, tmp_path, methods="static")
    ballast = torch.ones(2**28)  # 1 GiB here must not count there
    figures = memory.measure(settings, settings.rows()[0])
    del ballast
    assert figures["trained"] == BUDGET
    assert figures["before_mb"] <= figures["peak_mb"] < 1_000
    assert figures["steps"] == 3


def test_without_timing_a_row_is_what_its_memory_run_says(folder, tmp_path, monkeypatch):
    answers = {"frozen": {"peak_mb": 10.0, "before_mb": 5.0, "state_bytes": 0, "trainable": 0, "trained": 0}}
    monkeypatch.setattr(runner, "measure", lambda settings, row: answers.get(row.label, {"error": "no room"}))
    settings = settings_for(folder, tmp_path, methods="frozen,static", memory=True, timing=False)
    rows = run_bench(settings, lambda line: None)["rows"]
    assert [(row["status"], row["reason"]) for row in rows.values()] == [("ok", None), ("failed", "no room")]
    assert "| static | failed |" in (tmp_path / "bench.md").read_text()


def test_a_killed_memory_process_is_told_from_a_failed_one():
    assert memory._reason(-9, "") == "the process was killed by signal 9 (out of memory?)"
    assert memory._reason(1, "Traceback\nValueError: no\n") == "ValueError: no"


@pytest.mark.parametrize("dropout", [None, 0.0, 0.3])
def test_dropout_is_the_configs_own_or_what_is_asked_for(folder, tmp_path, dropout):
    plan = blueprint(settings_for(folder, tmp_path, dropout=dropout))
    found = {module.p for module in plan.build().modules() if isinstance(module, torch.nn.Dropout)}
    assert found == {0.1 if dropout is None else dropout}
    assert plan.describe()["dropout"]["hidden_dropout_prob"] == (0.1 if dropout is None else dropout)


def test_a_dropout_that_is_no_probability_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="dropout = 1"):
        settings_for(folder, tmp_path, dropout=1)


@pytest.mark.parametrize("share", [0, 1.1])
def test_a_share_of_the_memory_that_is_none_is_refused(share, folder, tmp_path):
    with pytest.raises(ConfigError, match=f"memory_share = {share}; it must be above 0 and at most 1"):
        settings_for(folder, tmp_path, memory_share=share)
