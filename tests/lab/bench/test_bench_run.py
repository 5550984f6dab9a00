"""Tests the whole benchmark on a model of a few thousand weights, in this process. No assertion is about a time."""

from __future__ import annotations

import json

import pytest
import torch
from bench_tiny import BUDGET, LINEAR, settings_for, write_config

from unmask.lab.bench import rows
from unmask.lab.bench.curves import run_curve, selection_cost
from unmask.lab.bench.models import blueprint
from unmask.lab.bench.rows import KINDS, RAMP, Row, mid_run
from unmask.lab.bench.run import RowResult, run_bench
from unmask.lab.bench.shapes import SHAPES, Shape
from unmask.lab.bench.tables import StepTime
from unmask.lab.bench.worker import measure

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant:UserWarning", "ignore:.*is_gradient_check:FutureWarning"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("tiny") / "tinybert")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Runs every row in this process; returns the settings, the record, the output folder and the lines of progress."""
    output, said = tmp_path_factory.mktemp("bench"), []
    settings = settings_for(folder, output)
    record = run_bench(settings, said.append, "unmask bench", measure)
    return settings, record, output, said


def report_of(seconds: float, peak: float = 100.0, count: int = 1) -> dict:
    """Returns the report of a process whose steps take so many seconds each."""
    steps = [{"draw": 0, "forward": seconds / 4, "backward": seconds / 2, "optimizer": seconds / 4, "selecting": False}]
    memory = {"peak_mb": peak, "before_mb": 50.0, "host_peak_mb": peak, "state_bytes": 8, "saved_bytes": 40}
    return {"steps": steps * count, "weights": {"trainable": 10, "trained": 10}, "memory": memory}


def test_every_row_is_measured_in_every_draw(whole):
    settings, record, _, said = whole
    assert list(record["rows"]) == list(KINDS)
    assert {row["status"] for row in record["rows"].values()} == {"ok"}
    assert record["complete"]
    assert len(said) == settings.draws * len(KINDS)
    assert said[0].startswith("draw 1 of 2, frozen: ")
    assert said[len(KINDS)].startswith("draw 2 of 2, full: ")
    assert "about 0 s to go" in said[-1]


def test_the_record_is_what_the_folder_holds(whole):
    _, record, output, _ = whole
    assert json.loads((output / "bench.json").read_text()) == json.loads(json.dumps(record))
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert record["model"]["dropout"]["hidden_dropout_prob"] == 0.1
    assert record["machine"]["threads"] == 1
    assert record["machine"]["versions"]["torch"] == torch.__version__
    page = (output / "bench.md").read_text()
    assert "budget 200, draws 2" in page
    assert all(page.count(f"| {label} |") == 2 for label in record["rows"])


def test_figures_agree_with_the_raw_steps(whole):
    settings, record, _, _ = whole
    for label, row in record["rows"].items():
        of_draw = [[step["total"] for step in row["steps"] if step["draw"] == draw] for draw in range(2)]
        assert [len(totals) for totals in of_draw] == [row["cycle"] * -(-settings.steps // row["cycle"])] * 2, label
        for step in row["steps"]:
            assert step["total"] == pytest.approx(step["forward"] + step["backward"] + step["optimizer"])
        totals = sorted(of_draw[0] + of_draw[1])
        middle = (totals[(len(totals) - 1) // 2] + totals[len(totals) // 2]) / 2
        assert row["timing"]["total"]["median"] == pytest.approx(middle)
        assert row["timing"]["tokens_per_second"] == pytest.approx(2 * 8 / middle)
        assert len(row["ratios"]["frozen"]["draws"]["each"]) == settings.draws
        assert len(row["memory_by_draw"]) == settings.draws


def test_rows_with_a_stride_select_once_in_a_cycle_and_exact_id3_at_every_step(whole):
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
    assert weights["authors"]["trained"] == settings.warmup + settings.steps  # it unmasks one weight a step
    for row in settings.rows():
        if row.selects:
            last = RAMP + settings.warmup + row.cycle * row.cycles(settings.steps) - 1
            schedule = mid_run(row, settings.warmup, settings.steps)
            assert weights[row.label]["trained"] == schedule(last, 0, BUDGET), row.label


def test_memory_and_bytes_on_disk_are_those_of_the_tensors(whole):
    settings, record, _, _ = whole
    memories = {label: row["memory"] for label, row in record["rows"].items()}
    total = record["model"]["parameters"]
    tensors = sum(1 for _ in blueprint(settings).build().parameters())
    assert memories["full"]["state_bytes"] == 2 * 4 * total + 4 * tensors
    assert memories["static"]["state_bytes"] == 2 * 4 * BUDGET + 4
    masks = total  # The authors' optimizer also keeps a mask of one byte a weight.
    assert memories["authors"]["state_bytes"] == 2 * 4 * total + 4 * tensors + masks
    assert memories["full"]["saved_bytes"] == 4 * total
    assert memories["frozen"]["saved_bytes"] is None
    for label, figures in memories.items():
        assert figures["peak_mb"] >= figures["before_mb"] > 0, label
        if label != "frozen":
            trained = record["rows"][label]["weights"]["trained"]
            assert figures["bytes_per_weight"] == figures["saved_bytes"] / trained, label


def test_one_row_runs_at_a_time_and_each_draw_begins_with_another(folder, tmp_path):
    begun = []

    def record_start(settings, row):
        begun.append(row.label)
        return report_of(1.0)

    settings = settings_for(folder, tmp_path, methods="frozen,static,id3", draws=4)
    run_bench(settings, lambda line: None, measure=record_start)
    rounds = ["frozen static id3", "static id3 frozen", "id3 frozen static", "frozen static id3"]
    assert begun == " ".join(rounds).split()


def test_a_ratio_is_the_median_over_the_draws_and_memory_is_that_of_the_median_draw(folder, tmp_path):
    seconds = {"frozen": iter([1.0, 2.0, 4.0]), "static": iter([1.5, 2.0, 8.0])}
    peaks = iter([300.0, 100.0, 200.0, 50.0, 50.0, 50.0])
    settings = settings_for(folder, tmp_path, methods="static,frozen", draws=3)
    record = run_bench(
        settings, lambda line: None, measure=lambda s, row: report_of(next(seconds[row.label]), next(peaks))
    )
    found = record["rows"]["static"]["ratios"]["frozen"]
    assert (found["ratio"], found["draws"]["each"]) == (1.5, [1.5, 1.0, 2.0])
    assert [memory["peak_mb"] for memory in record["rows"]["static"]["memory_by_draw"]] == [300.0, 50.0, 50.0]
    assert record["rows"]["static"]["memory"]["peak_mb"] == 50.0
    assert record["rows"]["static"]["memory"]["bytes_per_weight"] == 4.0


def test_a_missing_package_is_named_and_the_rest_runs(folder, tmp_path, monkeypatch):
    real = rows.importlib.util.find_spec
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda n: None if n == "selective_optimizers" else real(n))
    settings = settings_for(folder, tmp_path, methods="frozen,authors,static")
    record = run_bench(settings, lambda line: None, measure=lambda settings, row: report_of(1.0))
    assert record["rows"]["authors"]["status"] == "not installed"
    assert record["rows"]["authors"]["reason"] == "selective_optimizers is not installed: pip install 'unmask[bench]'"
    assert record["rows"]["authors"]["memory"] == {}
    assert [record["rows"][label]["status"] for label in ("frozen", "static")] == ["ok", "ok"]
    assert "authors: not installed" in (tmp_path / "bench.md").read_text()


def test_a_row_that_fails_is_left_out_from_then_on_and_the_rest_runs(folder, tmp_path):
    calls = []

    def fail_later(settings, row):
        calls.append(row.label)
        return {"error": "no room"} if calls.count("full") == 2 and row.label == "full" else report_of(1.0)

    settings = settings_for(folder, tmp_path, methods="frozen,full,static", draws=3)
    record = run_bench(settings, lambda line: None, measure=fail_later)
    assert [calls.count(label) for label in ("frozen", "full", "static")] == [3, 2, 3]
    full = record["rows"]["full"]
    assert (full["status"], full["reason"], full["steps"], full["memory"]) == ("failed", "no room", [], {})
    assert "full" not in record["rows"]["static"]["ratios"]
    assert "| full | failed |" in (tmp_path / "bench.md").read_text()


def test_a_run_that_is_stopped_keeps_the_steps_that_it_has_measured(folder, tmp_path):
    calls = []

    def stop(settings, row):
        calls.append(row.label)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return report_of(1.0, count=2)

    with pytest.raises(KeyboardInterrupt):
        run_bench(settings_for(folder, tmp_path, methods="frozen,static"), lambda line: None, measure=stop)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert not record["complete"]
    assert [len(row["steps"]) for row in record["rows"].values()] == [2, 4]
    assert record["rows"]["static"]["ratios"]["frozen"]["ratio"] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # there is no partial file


@pytest.fixture
def tiny_shapes(monkeypatch):
    """Adds two small shapes, and returns their names, the smaller first."""
    dims = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    for layers in (1, 2):
        shape = Shape(f"tiny{layers}", "bert", dims | {"num_hidden_layers": layers})
        monkeypatch.setitem(SHAPES, shape.name, shape)
    return ["tiny1", "tiny2"]


def test_the_curve_over_the_budget(folder, tmp_path):
    settings = settings_for(folder, tmp_path, curve="budget", draws=1)
    record = run_curve(settings, lambda line: None, measure=measure, budgets=(10, 100, 10**9))
    assert [point["budget"] for point in record["points"]] == [10, 100]
    rows = record["rows"]["tinybert"]
    for point in record["points"]:
        static = rows[f"static@{point['budget']}"]["ratios"]["frozen"]["ratio"]
        assert point["static"] == static
        assert point["id3-10 between"] > 0 < point["id3-10 selecting"]
    assert record["notes"] == ["The budgets above the model's 6,290 weights are left out."]
    assert json.loads((tmp_path / "curve-budget.json").read_text())["complete"]
    assert (tmp_path / "curve-budget.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_over_the_size_stops_where_a_row_fails(tiny_shapes, folder, tmp_path):
    def measured(settings, row):
        if settings.model == "tiny2" and row.kind == "static":
            return {"error": "the process was killed by signal 9 (out of memory?)"}
        return report_of(1.0 + (row.kind == "static"))

    settings = settings_for(folder, tmp_path, curve="size")
    record = run_curve(settings, lambda line: None, measure=measured, models=[*tiny_shapes, "tiny1"])
    points = record["points"]
    assert [point["model"] for point in points] == tiny_shapes
    assert points[0]["parameters"] < points[1]["parameters"]
    assert [(point["frozen"], point["static"]) for point in points] == [(1.0, 2.0), (1.0, None)]
    assert record["notes"][-1] == "The curve stops at tiny2, where a row failed."
    assert (tmp_path / "curve-size.png").exists()


def test_the_cost_of_selecting_per_model(tiny_shapes, folder, tmp_path):
    settings = settings_for(folder, tmp_path, curve="selection")
    seconds = {"id3": 3.0, "full": 2.0}
    record = run_curve(
        settings, lambda line: None, measure=lambda s, row: report_of(seconds[row.label]), models=tiny_shapes
    )
    assert [point["share of backward"] for point in record["points"]] == [0.5, 0.5]
    assert (tmp_path / "curve-selection.md").read_text().count("| tiny") == 2


def test_the_cost_of_selecting_is_a_share_of_the_dense_backward_within_each_draw():
    full = [StepTime(0, 1.0, 2.0, 1.0), StepTime(1, 1.0, 4.0, 1.0)]
    ours = [StepTime(0, 1.0, 3.0, 0.0), StepTime(1, 1.0, 5.0, 0.0)]
    found = selection_cost(ours, full)
    assert found["share of backward"] == pytest.approx((0.5 + 0.25) / 2)
    assert (found["id3 backward"], found["full backward"]) == (4.0, 3.0)


def test_an_error_drops_the_figures_of_earlier_draws():
    result = RowResult(Row("full", "full", 1))
    result.add(report_of(1.0), 0)
    assert (result.status, len(result.steps), len(result.memories)) == ("ok", 1, 1)
    result.add({"error": "RuntimeError: first line"}, 1)
    assert (result.status, result.reason, result.steps, result.memory()) == (
        "failed",
        "RuntimeError: first line",
        [],
        {},
    )
