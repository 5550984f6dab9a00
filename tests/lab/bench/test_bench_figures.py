"""The benchmark's arithmetic, on records worked by hand: no model, no clock."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from unmask import ConfigError
from unmask.lab.bench.bars import BARS, Bar, judge, off_reference
from unmask.lab.bench.curves import selection_cost
from unmask.lab.bench.grouping import plan_groups, row_bytes, too_large
from unmask.lab.bench.lanes import cycles_of
from unmask.lab.bench.ours import mid_run
from unmask.lab.bench.peers import shira_rank
from unmask.lab.bench.rounds import RowResult, rotated
from unmask.lab.bench.rows import KINDS, Row, parse_rows
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.stats import StepTime, ratio, round_medians, spread, timing
from unmask.lab.bench.tables import plain
from unmask.methods.presets import id3


def steps(*totals: float, group: int = 0, round_: int = 0, selecting: bool = False) -> list[StepTime]:
    """Steps of these lengths: a quarter forward, half backward, a quarter optimizer."""
    return [StepTime(group, round_, t / 4, t / 2, t / 4, selecting) for t in totals]


def test_a_total_is_the_sum_of_its_phases():
    figures = timing([StepTime(0, 0, 1.0, 2.0, 4.0), StepTime(0, 1, 3.0, 6.0, 12.0)], stride=1, tokens=28)
    assert figures["forward"]["median"] == 2.0
    assert figures["backward"]["median"] == 4.0
    assert figures["optimizer"]["median"] == 8.0
    assert figures["total"] == {"median": 14.0, "q1": 10.5, "q3": 17.5, "min": 7.0, "max": 21.0}
    assert figures["tokens_per_second"] == 2.0
    assert "amortised" not in figures


def test_spread_of_one_value_is_that_value():
    assert set(spread([3.0]).values()) == {3.0}


def test_a_stride_of_10_amortises_to_the_mean_over_whole_cycles():
    cycle = steps(11.0, selecting=True) + steps(*[1.0] * 9)
    figures = timing(cycle * 2, stride=10, tokens=1)
    assert (figures["selecting"], figures["between"]) == (11.0, 1.0)
    assert figures["amortised"] == pytest.approx(2.0)
    assert figures["total"]["median"] == 1.0  # what the bars call a step


def test_a_stride_of_100_is_extrapolated_from_short_cycles():
    figures = timing(steps(41.0, selecting=True) + steps(1.0, 1.0, 1.0), stride=100, tokens=1)
    assert figures["amortised"] == pytest.approx(1.4)  # (41 + 99) / 100


def test_ratios_are_of_medians_and_their_spread_is_over_rounds():
    above = steps(2.0, 2.0, 9.0) + steps(6.0, 6.0, 6.0, round_=1)
    below = steps(1.0, 1.0, 1.0) + steps(2.0, 2.0, 9.0, round_=1)
    assert round_medians(above) == {(0, 0): 2.0, (0, 1): 6.0}
    found = ratio(above, below)
    assert found["ratio"] == 6.0 / 1.5
    assert found["rounds"]["each"] == [2.0, 3.0]
    assert found["through"] is None


def test_rows_of_different_groups_compare_through_the_frozen_row():
    frozen = steps(1.0) + steps(2.0, group=1)  # the machine was slower in the second group
    above, below = steps(3.0), steps(4.0, group=1)
    assert ratio(above, below) is None
    found = ratio(above, below, frozen)
    assert (found["ratio"], found["through"], found["rounds"]) == (1.5, "frozen", None)
    assert ratio(below, frozen)["ratio"] == 2.0  # only the group that both ran in


def test_every_bar_of_the_issue_is_there():
    assert len(BARS) == 11
    assert [bar.limit for bar in BARS] == [1.05, 0.88, 0.62, 0.93, 0.65, 0.65, 0.95, 0.70, 1.28, 1.15, 0.90]
    rows = [row for bar in BARS for row in (*bar.numerators, bar.denominator)]
    assert parse_rows(",".join(dict.fromkeys(rows)), 1)  # each is a row that can be asked for
    assert {bar.dtype for bar in BARS} == {"float32", "autocast"}


def test_bars_are_met_missed_or_not_measured():
    bars = (
        Bar("cheap", ("static", "id3-10"), "frozen", "step", 1.05),
        Bar("small", ("id3",), "full", "memory", 0.7),
        Bar("gone", ("static",), "shira", "step", 0.65),
        Bar("other dtype", ("static",), "frozen", "step", 0.1, "autocast"),
    )
    measured = {"frozen": steps(1.0), "static": steps(1.05), "id3-10": steps(1.06)}
    found = judge(measured, {"id3": 8.0, "full": 10.0}, {"id3-10": 1.5}, "float32", bars)
    assert [(e["bar"], e["row"], e["verdict"]) for e in found] == [
        ("cheap", "static", "met"),
        ("cheap", "id3-10", "not met"),
        ("small", "id3", "not met"),
        ("gone", "static", "not measured"),
    ]
    assert found[1]["measured"] == pytest.approx(1.06)
    assert found[1]["amortised"] == pytest.approx(1.59)
    assert found[0]["amortised"] is None
    assert found[2]["measured"] == 0.8
    assert found[3]["measured"] is None


def test_a_bar_is_judged_by_the_median_over_all_timed_steps():
    bars = (Bar("b", ("static",), "frozen", "step", 1.0),)
    frozen = steps(1.0, 1.0, 1.0) + steps(4.0, 4.0, 4.0, round_=1)
    static = steps(0.9, 0.9, 0.9) + steps(4.0, 4.0, 4.0, round_=1)
    (entry,) = judge({"frozen": frozen, "static": static}, {}, {}, "float32", bars)
    assert entry["measured"] == pytest.approx(2.45 / 2.5)
    assert entry["rounds"]["each"] == [0.9, 1.0]


def test_bars_apply_to_one_configuration_only():
    settings = BenchSettings()
    assert off_reference(settings, 16, 128, "cpu") == []
    assert off_reference(dataclasses.replace(settings, dtype="autocast"), 16, 128, "cpu") == []
    for change in ({"threads": 1}, {"budget": 10}, {"dtype": "bf16"}, {"lora_r": 4}, {"model": "mpnet"}):
        (reason,) = off_reference(dataclasses.replace(settings, **change), 16, 128, "cpu")
        assert next(iter(change)) in reason
    assert off_reference(settings, 8, 128, "cpu") == ["batch_size is 8, not 16"]
    assert off_reference(settings, 16, 128, "cuda") == ["device is cuda, not cpu"]


def test_every_round_starts_with_another_row_and_runs_them_all():
    orders = [rotated(["a", "b", "c"], number) for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert rotated([], 3) == []


def test_rows_share_memory_if_they_fit_and_else_each_group_has_the_reference():
    held = {"frozen": 10, "a": 10, "b": 10, "c": 10}
    assert plan_groups(held, step=2, free=60) == [["frozen", "a", "b", "c"]]  # 40 + 2 of 42
    assert plan_groups(held, step=3, free=60) == [["frozen", "a", "b"], ["frozen", "c"]]
    assert plan_groups(held, step=3, free=60, isolate=True) == [["frozen", "a"], ["frozen", "b"], ["frozen", "c"]]
    assert plan_groups(held, step=3, free=None) == [["frozen", "a", "b", "c"]]
    assert plan_groups({"a": 10, "b": 10}, step=0, free=20) == [["a"], ["b"]]
    assert plan_groups({"a": 10, "b": 10}, step=0, free=20, share=1.0) == [["a", "b"]]
    assert plan_groups({"frozen": 10}, step=0, free=1) == [["frozen"]]


def test_what_cannot_fit_at_all_is_told_with_figures():
    held = {"frozen": 2 * 2**30, "a": 2**30}
    assert too_large(["frozen", "a"], held, 2**30, 4 * 2**30) is None
    assert "about 4.0 GiB" in too_large(["frozen", "a"], held, 2**30, 3 * 2**30)


def test_dense_rows_hold_two_moments_more():
    frozen, full, authors = (row_bytes(Row(kind, kind, 0), 100) for kind in ("frozen", "full", "authors"))
    assert (frozen, full, authors) == (100, 300, 325)


@pytest.mark.parametrize("kind", ["id3", "id3-10", "id3-100"])
@pytest.mark.parametrize("budget", [20, 1_000, 320_000])
@pytest.mark.parametrize("rounds", [1, 5, 40])
def test_id3_is_timed_around_half_of_its_budget(kind, budget, rounds):
    row = Row(kind, kind, budget)
    cycles = cycles_of(row, BenchSettings(rounds=rounds))
    method = id3(budget, row.cycle * (cycles + 2), schedule=mid_run(row, cycles))
    method.schedule.check(budget)
    counts = [method.cumulative(t, budget) for t in range(row.cycle * cycles)]
    assert counts[0] >= 1
    middle = counts[len(counts) // 2]
    assert abs(middle - budget / 2) <= max(0.06 * budget, row.stride * budget / 1_000 + 1)
    taken = [b - a for a, b in zip(counts[:: row.cycle], counts[row.cycle :: row.cycle], strict=False)]
    assert sum(taken) <= 0.8 * budget
    if budget >= 1_000:  # what the planned run of 1,000 steps unmasks, unless that were too much in all
        share = min(budget * row.stride / 1_000, 0.8 * budget / cycles)
        assert all(int(share) <= count <= share + 1 for count in taken)
        assert all(taken)


def test_a_ramp_fills_half_of_the_budget_in_small_parts():
    row = Row("id3-10", "id3-10", 320_000)
    schedule = mid_run(row, cycles=2, ramp=50)
    counts = [schedule(t, 0, row.budget) for t in range(50 + 20)]
    assert max(b - a for a, b in pairwise(counts)) <= row.budget // 100
    assert counts[49] == schedule.start == (320_000 - 6_400) // 2
    assert counts[50:] == [schedule.start + 3_200] * 10 + [schedule.start + 6_400] * 10


def test_a_cycle_of_a_long_stride_is_short():
    assert [Row(k, k, 1).cycle for k in ("static", "id3", "id3-7", "id3-10", "id3-100")] == [1, 1, 7, 10, 4]


def test_shira_takes_the_nearest_rank_and_leaves_out_what_has_no_room():
    layers = {"wide": (768, 3072), "square": (768, 768), "out": (768, 2)}
    assert shira_rank(layers, 3840 + 1536 + 770) == (1, ["wide", "square", "out"])
    assert shira_rank(layers, 11_000) == (2, ["wide", "square"])
    assert shira_rank(layers, 13_500) == (
        3,
        ["wide", "square"],
    )  # 10,752 and 16,128: the first is nearer by 2,748 to 2,628
    with pytest.raises(ConfigError, match="rank 1"):
        shira_rank({"thin": (1, 8)}, 5)


def test_rows_are_named_or_refused():
    assert [row.label for row in parse_rows("all", 5)] == list(KINDS)
    assert parse_rows("all,static@10000", 5)[-1] == Row("static@10000", "static", 10_000)
    assert parse_rows(" id3-7 ", 5)[0].stride == 7
    for bad, message in (
        ("lorra", "unknown method 'lorra'; there are frozen, full"),
        ("id3-1", "unknown method"),
        ("static@", "must be a count"),
        ("static@1e6", "must be a count"),
        ("static,static", "more than once"),
        (" , ", "methods is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_rows(bad, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "must be one of float32, autocast, bf16"),
        ({"device": "tpu"}, "must be one of auto, cpu, cuda"),
        ({"curve": "time"}, "must be one of budget, size, selection"),
        ({"rounds": 0}, "rounds = 0; it must be a whole number, at least 1"),
        ({"warmup": 0}, "at least 1"),
        ({"draws": 0}, "draws = 0; it must be a whole number, at least 1"),
        ({"curve": "size", "processes": True}, "the rows of a curve share one process"),
        ({"budget": "many"}, "whole number"),
        ({"seq_len": 1}, "at least 2"),
        ({"model": "roberta"}, "the shapes are roberta-base, minilm"),
        ({"methods": "lorra"}, "unknown method"),
        ({"memory": False, "timing": False}, "neither memory nor timing"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**change)


def test_the_cost_of_selecting_is_a_share_of_the_dense_backward_within_each_round():
    full = [StepTime(0, 0, 1.0, 2.0, 1.0), StepTime(0, 1, 1.0, 4.0, 1.0)]
    id3_steps = [StepTime(0, 0, 1.0, 3.0, 0.0), StepTime(0, 1, 1.0, 5.0, 0.0)]
    found = selection_cost(id3_steps, full)
    assert found["share of backward"] == pytest.approx((0.5 + 0.25) / 2)
    assert (found["id3 backward"], found["full backward"]) == (4.0, 3.0)


def test_a_failed_row_keeps_its_reason_and_no_figures():
    result = RowResult(Row("full", "full", 1), steps=steps(1.0))
    result.fail(RuntimeError("first line\nsecond line"))
    assert (result.status, result.reason, result.steps) == ("failed", "RuntimeError: first line", [])


def test_plain_tables_are_aligned():
    assert plain(("a", "b"), [["long", "1"], ["x", "100"]]) == "a       b\nlong    1\nx     100"
