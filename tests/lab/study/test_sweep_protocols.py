"""Tests the choice of a rate, the two protocols and the estimate of the time left, on cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from unmask.errors import ConfigError, DataError
from unmask.lab.study import best_of, expand, interval, parse
from unmask.lab.study.choosing import choose, due
from unmask.lab.study.live import remaining, time_left
from unmask.lab.study.spec import Choice, Protocol

RATES = ("1e-4", "1e-3", "1e-2")
SEEDS = Protocol()


def cells(seeds=(0, 1, 2), rates=RATES, rows=("id3",)):
    return expand(
        parse(
            {
                "settings": {"model": "m", "task": "rte", "budget": "1%"},
                "axes": {"seed": list(seeds)},
                "methods": {row: {"grid": {"lr": list(rates)}, "settings": {"method": row}} for row in rows},
            }
        )
    )


def results(grid, figures, **more):
    """Returns the results of the cells whose (seed, lr) has a loss among the figures."""
    found = {}
    for cell in grid:
        loss = figures.get((cell.labels["seed"], cell.labels["lr"]))
        if loss is not None:
            done = {"status": "done", "loss": loss, "seconds": 10.0, "settings": dict(cell.settings)}
            found[cell.id] = {"status": "failed"} if loss == "failed" else done | {"score": -loss} | more
    return found


def only(chosen):
    (value,) = chosen.values()
    return value


def test_the_rate_of_least_loss_is_chosen_once_all_have_ended():
    grid, choice = cells(), Choice()
    first = {(0, "1e-4"): 0.5, (0, "1e-3"): 0.4}
    waiting = only(choose(grid, choice, results(grid, first)))
    assert (waiting.value, waiting.final) == ("1e-3", False)
    assert {c.labels["seed"] for c in due(grid, SEEDS, choice, results(grid, first))} == {0}
    chosen = only(choose(grid, choice, results(grid, first | {(0, "1e-2"): 0.45})))
    assert (chosen.value, chosen.edge, chosen.final) == ("1e-3", None, True)
    assert chosen.tried == {"1e-4": 0.5, "1e-3": 0.4, "1e-2": 0.45}
    after = due(grid, SEEDS, choice, results(grid, first | {(0, "1e-2"): 0.45}))
    assert [(c.labels["seed"], c.labels["lr"]) for c in after] == [
        (0, "1e-4"), (0, "1e-3"), (0, "1e-2"), (1, "1e-3"), (2, "1e-3"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "edge"), [((0.1, 0.2, 0.3), "low"), ((0.3, 0.2, 0.1), "high"), ((0.2, 0.1, 0.2), None)]
)
def test_a_rate_at_the_edge_of_its_grid_is_flagged(losses, edge):
    grid = cells(seeds=(0,))
    found = results(grid, {(0, rate): loss for rate, loss in zip(RATES, losses, strict=True)})
    assert only(choose(grid, Choice(), found)).edge == edge


def test_a_grid_in_any_order_has_the_same_edges():
    grid = cells(seeds=(0,), rates=("1e-2", "1e-4", "1e-3"))
    assert (
        only(choose(grid, Choice(), results(grid, {(0, "1e-2"): 0.1, (0, "1e-4"): 0.2, (0, "1e-3"): 0.3}))).edge
        == "high"
    )


def test_one_rate_is_no_choice_and_all_seeds_are_due():
    grid = cells(rates=("1e-3",))
    assert only(choose(grid, Choice(), {})).edge == "alone"
    assert due(grid, SEEDS, Choice(), {}) == grid


def test_runs_that_failed_are_not_chosen_and_block_nothing():
    grid = cells()
    figures = {(0, "1e-4"): 0.5, (0, "1e-3"): "failed", (0, "1e-2"): math.nan}
    chosen = only(choose(grid, Choice(), results(grid, figures)))
    assert (chosen.value, chosen.final) == ("1e-4", True)
    none = only(choose(grid, Choice(), results(grid, dict.fromkeys(figures, "failed"))))
    assert (none.value, none.final) == (None, True)
    assert len(due(grid, SEEDS, Choice(), results(grid, dict.fromkeys(figures, "failed")))) == 3


def test_the_choice_can_be_by_a_metric_and_over_several_seeds():
    grid, choice = cells(), Choice(seeds=(0, 1), by="score")
    figures = {(seed, rate): loss for seed in (0, 1) for rate, loss in zip(RATES, (0.3, 0.2, 0.4), strict=True)}
    figures[1, "1e-4"] = 0.05
    assert only(choose(grid, choice, results(grid, figures))).value == "1e-4"
    named = results(grid, figures, summary={"after": {"accuracy": 0.5}})
    first = next(iter(named))
    named[first]["summary"] = {"after": {"accuracy": 0.9}}
    assert only(choose(grid, Choice(seeds=(0, 1), by="accuracy"), named)).tried["1e-4"] == pytest.approx(0.7)


def test_every_method_chooses_for_itself():
    grid = cells(rows=("id3", "pafi"), seeds=(0,))
    found = results(grid, dict.fromkeys([(0, r) for r in RATES], 0.5))
    best = next(c.id for c in grid if c.labels["method"] == "pafi" and c.labels["lr"] == "1e-2")
    found[best]["loss"] = 0.1
    chosen = {dict(group)["method"]: c.value for group, c in choose(grid, Choice(), found).items()}
    assert chosen == {"id3": "1e-4", "pafi": "1e-2"}


def test_the_papers_protocol_takes_the_best_three_of_four():
    estimate = best_of([0.70, 0.90, 0.80, 0.85])
    assert estimate.mean == pytest.approx(0.85)
    assert estimate.deviation == pytest.approx(0.05)
    assert (estimate.n, estimate.of, estimate.low) == (3, 4, None)
    assert best_of([0.5]).deviation is None


def test_the_interval_is_that_of_students_t():
    scores = [0.81, 0.79, 0.84, 0.80, 0.76]
    # The factor is Student's t for 4 degrees of freedom with 5% in each tail, from a printed table.
    reach = 2.131847 * np.std(scores, ddof=1) / 5**0.5
    mine = interval(scores, level=0.9)
    assert (mine.low, mine.high) == (pytest.approx(0.8 - reach, abs=1e-7), pytest.approx(0.8 + reach, abs=1e-7))
    assert interval([0.8]).low is None


def test_the_bootstrap_is_repeatable_and_near_scipys():
    scores = np.random.default_rng(0).normal(0.8, 0.02, 30).tolist()
    mine, again = (interval(scores, how="bootstrap") for _ in range(2))
    assert mine == again
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert (mine.low, mine.high) == (pytest.approx(theirs.low, abs=5e-4), pytest.approx(theirs.high, abs=5e-4))


def test_intervals_cover_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        estimate = interval(generator.normal(0, 1, 4).tolist())
        covered += estimate.low <= 0 <= estimate.high
    assert 0.92 < covered / 400 < 0.98


@pytest.mark.parametrize("scores", [[], [0.5, math.nan]])
def test_scores_that_have_no_mean_are_refused(scores):
    with pytest.raises(DataError, match="score"):
        interval(scores)
    with pytest.raises(DataError, match="score"):
        best_of(scores)


def test_equal_scores_have_an_interval_of_no_width():
    for how in ("t", "bootstrap"):
        found = interval([0.5, 0.5, 0.5], how=how)
        assert (found.low, found.mean, found.high, found.deviation) == (0.5, 0.5, 0.5, 0.0)


def test_levels_and_counts_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="level = 95"):
        interval([0.5, 0.6], level=95)
    with pytest.raises(ConfigError, match="best = 0"):
        best_of([0.5], best=0)


def test_the_time_left_counts_the_runs_that_the_choice_will_add():
    grid = cells()
    first = results(grid, {(0, "1e-4"): 0.5})
    left = remaining(grid, SEEDS, Choice(), first)
    assert [c.labels["seed"] for c in left] == [
        0,
        0,
        1,
        2,
    ]  # Two rates are left to try, then each other seed has one run.
    assert time_left(left, first, {}, 1) == 40
    assert time_left(left, first, {left[0].id: 7.0}, 1) == 33
    assert time_left(left, first, {}, 4) == 10
    assert time_left(left, {}, {}, 1) is None


def test_the_time_of_a_run_is_estimated_from_runs_that_are_like_it():
    grid = cells(rows=("id3", "pafi"), seeds=(0, 1), rates=("1e-3",))
    found = {
        c.id: {"status": "done", "settings": dict(c.settings), "seconds": 30.0 if c.labels["method"] == "id3" else 2.0}
        for c in grid
        if c.labels["seed"] == 0
    }
    left = [c for c in grid if c.id not in found]
    assert {c.labels["method"]: time_left([c], found, {}, 1) for c in left} == {"id3": 30.0, "pafi": 2.0}


def test_the_papers_runs_pair_each_rate_with_a_seed():
    grid = cells(seeds=(6, 7, 8), rows=("id3", "pafi"))
    pairs = Protocol(kind="paper", pair="lr")
    wanted = {(row, seed, rate) for row in ("id3", "pafi") for seed, rate in zip((6, 7, 8), RATES, strict=True)}
    assert {
        (c.labels["method"], c.labels["seed"], c.labels["lr"]) for c in due(grid, pairs, Choice(seeds=(6,)), {})
    } == wanted
    assert len(remaining(grid, pairs, Choice(seeds=(6,)), {})) == 6
    one = cells(seeds=(6, 7, 8), rates=("1e-3",))
    assert due(one, pairs, None, {}) == one  # A row with one rate runs it with every seed.


def test_both_protocols_share_the_runs_that_each_needs():
    grid, both, choice = cells(seeds=(6, 7, 8)), Protocol(kind="both", pair="lr"), Choice(seeds=(6,))
    first = due(grid, both, choice, {})
    assert [(c.labels["seed"], c.labels["lr"]) for c in first] == [
        (6, "1e-4"), (6, "1e-3"), (6, "1e-2"), (7, "1e-3"), (8, "1e-2"),
    ]  # fmt: skip
    known = results(grid, {(6, "1e-4"): 0.5, (6, "1e-3"): 0.6, (6, "1e-2"): 0.7})
    after = {(c.labels["seed"], c.labels["lr"]) for c in due(grid, both, choice, known)}
    assert after - {(c.labels["seed"], c.labels["lr"]) for c in first} == {(7, "1e-4"), (8, "1e-4")}


def test_pairs_need_as_many_values_as_seeds():
    values = {
        "settings": {"model": "m", "task": "rte", "budget": "1%"},
        "axes": {"seed": [0, 1]},
        "methods": {"id3": {"grid": {"lr": list(RATES)}}},
        "protocol": {"kind": "paper", "pair": "lr"},
    }
    with pytest.raises(ConfigError, match="id3 has 3 values of lr and 2 seeds; give as many of both"):
        expand(parse(values))
    assert len(expand(parse({**values, "protocol": {"kind": "seeds", "pair": "lr"}}))) == 6
