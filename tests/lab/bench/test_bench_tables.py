"""Tests the benchmark's settings, rows and arithmetic on values worked by hand, without a model or a clock."""

from __future__ import annotations

import dataclasses

import pytest

from unmask import ConfigError
from unmask.lab.bench.rows import KINDS, Row, parse_rows
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.tables import StepTime, by_draw, plain, ratio, spread, timing


def steps(*totals: float, draw: int = 0, selecting: bool = False) -> list[StepTime]:
    """Returns steps of these lengths: a quarter forward, half backward, a quarter optimizer."""
    return [StepTime(draw, t / 4, t / 2, t / 4, selecting) for t in totals]


def test_a_total_is_the_sum_of_its_phases():
    figures = timing([StepTime(0, 1.0, 2.0, 4.0), StepTime(1, 3.0, 6.0, 12.0)], stride=1, tokens=28)
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
    assert figures["total"]["median"] == 1.0


def test_a_stride_of_100_is_extrapolated_from_short_cycles():
    figures = timing(steps(41.0, selecting=True) + steps(1.0, 1.0, 1.0), stride=100, tokens=1)
    assert figures["amortised"] == pytest.approx(1.4)  # (41 + 99) / 100


def test_a_ratio_is_the_median_of_the_draws_ratios_of_medians():
    above = steps(2.0, 2.0, 9.0) + steps(6.0, 6.0, 6.0, draw=1) + steps(8.0, draw=2)
    below = steps(1.0, 1.0, 1.0) + steps(2.0, 2.0, 9.0, draw=1) + steps(1.0, draw=3)
    assert by_draw(above) == {0: 2.0, 1: 6.0, 2: 8.0}
    found = ratio(above, below)
    assert found["ratio"] == 2.5
    assert found["draws"]["each"] == [2.0, 3.0]  # the two draws that both rows have
    assert ratio(steps(1.0), steps(1.0, draw=1)) is None


def test_a_machine_that_grows_slower_does_not_change_a_ratio():
    speeds = (1.0, 3.0, 10.0)
    above = [step for draw, speed in enumerate(speeds) for step in steps(2.0 * speed, draw=draw)]
    below = [step for draw, speed in enumerate(speeds) for step in steps(1.0 * speed, draw=draw)]
    assert ratio(above, below)["draws"] == {**spread([2.0]), "each": [2.0, 2.0, 2.0]}


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
        ({"draws": 0}, "draws = 0; it must be a whole number, at least 1"),
        ({"warmup": 0}, "at least 1"),
        ({"steps": True}, "steps = True; it must be a whole number"),
        ({"budget": "many"}, "whole number"),
        ({"seq_len": 1}, "at least 2"),
        ({"dropout": 1}, "dropout = 1; it must be at least 0 and below 1"),
        ({"model": "roberta"}, "the shapes are roberta-base, minilm"),
        ({"methods": "lorra"}, "unknown method"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        BenchSettings(**change)


def test_every_setting_has_a_help_text():
    texts = {field.name: field.metadata["help"] for field in dataclasses.fields(BenchSettings)}
    assert all(text.endswith(".") for text in texts.values()), texts
    named = texts["methods"]
    assert [kind for kind in KINDS if kind not in named] == []


def test_plain_tables_are_aligned():
    assert plain(("a", "b"), [["long", "1"], ["x", "100"]]) == "a       b\nlong    1\nx     100"
