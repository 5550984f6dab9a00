"""Tests a sweep's tables: the paper's pairs of rate and seed, the columns of a task, and the paper's figures."""

from __future__ import annotations

from statistics import mean, stdev

import pytest

from unmask.errors import ConfigError
from unmask.lab.study import expand, parse
from unmask.lab.study.columns import columns_of
from unmask.lab.study.records import records
from unmask.lab.study.spec import Claim, Protocol
from unmask.lab.study.tables import average_text, claim_text, markdown, tables

RATES, SEEDS = ("1e-4", "3e-4", "5e-4", "7e-4"), (6, 7, 8, 9)
PAPER = {"kind": "paper", "best": 3, "pair": "lr"}
CLAIMS = {
    "model": "DeBERTa",
    "rows": [
        {
            "method": "id3",
            "budget": "103K of 184M",
            "count": "103K",
            "scores": {"mnli-m": "89.38 0.07", "mnli-mm": "89.70 0.10", "rte": "87.12 2.17"},
            "average": "88.13",
        }
    ],
}


def grid(**values):
    sweep = parse(
        {
            "settings": {"model": "m"},
            "axes": {"task": ["mnli", "rte"], "budget": ["103K of 184M", "320K of 184M"], "seed": list(SEEDS)},
            "methods": {"id3": {"grid": {"lr": list(RATES)}}},
            "choose": {"seeds": [6]},
            "protocol": PAPER,
            "claims": CLAIMS,
            **values,
        }
    )
    return sweep, expand(sweep)


def done(cell, score, after=None, **summary):
    known = {"budget": 100, "parameters": 1000, "method": {"name": "id3", "strategy": "increment"}}
    return {
        "status": "done",
        "score": score,
        "loss": 1 - score,
        "metric": "accuracy",
        "settings": dict(cell.settings),
        "summary": {**known, "after": after or {"accuracy": score}, **summary},
    }


def results(cells):
    """Returns results: MNLI's scores rise with the rate, and mismatched is one point better; RTE's scores fall."""
    found = {}
    for cell in cells:
        place = RATES.index(cell.labels["lr"]) / 100 + (cell.labels["seed"] - 6) / 1000
        if cell.labels["task"] == "mnli":
            after = {"dev_matched_accuracy": 0.8 + place, "dev_mismatched_accuracy": 0.81 + place}
            found[cell.id] = done(cell, 0.8 + place, after)
        else:
            found[cell.id] = done(cell, 0.7 - place)
    return found


def test_the_papers_table_takes_the_best_three_of_the_four_pairs_in_each_column():
    sweep, cells = grid()
    first, every = tables(cells, results(cells), sweep.protocol, sweep.choice, sweep.claims)
    assert first.columns == ("mnli-m", "mnli-mm", "rte")
    line = first.lines[0]
    assert line.labels == {"method": "id3", "budget": "103K of 184M"}  # It has no lr, which is part of the protocol.
    pairs = [0.011 * i for i in range(4)]
    matched = line.entries["mnli-m"].best
    assert (matched.n, matched.of) == (3, 4)
    assert matched.mean == pytest.approx(0.8 + mean(pairs[1:]))
    assert matched.deviation == pytest.approx(stdev(pairs[1:]))
    assert line.entries["rte"].best.mean == pytest.approx(0.7 - mean(pairs[:3]))
    means = [line.entries[c].best.mean for c in first.columns]
    assert line.average == pytest.approx(mean(means))  # It is the mean of the columns, so MNLI counts twice.
    assert every.lines[0].entries["mnli-m"].seeds.mean == pytest.approx(0.8 + mean(pairs))
    assert "best 3 of 4 runs" in markdown(first)


def test_the_papers_figures_stand_in_separate_columns():
    sweep, cells = grid()
    first, every = tables(cells, results(cells), sweep.protocol, sweep.choice, sweep.claims)
    title, _, header, _, row, other, *_ = markdown(first).splitlines()
    assert "The paper's protocol" in title
    assert header == (
        "| method | budget | weights | mnli-m | paper | mnli-mm | paper | rte | paper | average | paper "
        "| the paper's model and budget |"
    )
    assert "| 89.38 ± 0.07 |" in row
    assert "| 89.70 ± 0.10 |" in row  # Every printed digit is shown.
    assert "| 87.12 ± 2.17 |" in row
    assert "| 88.13 (of its columns: 88.73) | DeBERTa, 103K |" in row
    assert other.endswith("|  |  |")  # The claims have no figure for the other budget.
    assert "not measured here" in markdown(first)
    assert "paper" not in markdown(every).splitlines()[2]


def test_both_protocols_stand_next_to_each_other_labelled():
    sweep, cells = grid(protocol={**PAPER, "kind": "both"})
    first, second, third = tables(cells, results(cells), sweep.protocol, sweep.choice, sweep.claims)
    assert first.title.startswith("The paper's protocol")
    assert second.title == "Ours: lr chosen by loss on seed 6, then mean over seeds"
    assert third.title.startswith("The same runs, all of them")
    assert second.lines[0].entries["mnli-m"].value == "7e-4"
    assert second.lines[0].entries["mnli-m"].seeds.mean == pytest.approx(0.83 + 0.0015)
    (alone,) = tables(cells, {}, Protocol(kind="seeds", pair="lr"), sweep.choice)
    assert alone.title == second.title


def test_the_legend_counts_the_runs_that_there_are():
    sweep, cells = grid(
        axes={"task": ["rte"], "seed": [7, 8]}, methods={"id3": {"grid": {"lr": ["3e-4", "5e-4"]}}}, choose=None,
        settings={"model": "m", "budget": "1%"},
    )  # fmt: skip
    first, _ = tables(cells, results(cells), sweep.protocol, sweep.choice)
    assert "the best 2 of 2 runs" in markdown(first)
    assert "best 3" not in markdown(first)


def test_word_problems_have_a_column_for_each_set_and_their_mean():
    sets = ["gsm8k", "svamp"]
    sweep, cells = grid(
        settings={"model": "m", "test_sets": sets, "budget": "1%"}, axes={"task": ["math10k"], "seed": [42]},
        methods={"id3": {}}, choose=None, claims=None,
    )  # fmt: skip
    (cell,) = cells
    known = {cell.id: done(cell, 0.3, {"gsm8k_accuracy": 0.2, "svamp_accuracy": 0.4, "accuracy": 0.3})}
    first, _ = tables(cells, known, sweep.protocol, sweep.choice)
    assert first.columns == ("gsm8k", "svamp")
    assert [first.lines[0].entries[name].best.mean for name in sets] == [0.2, 0.4]
    assert first.lines[0].average == pytest.approx(0.3)
    assert "the one run (no deviation)" in markdown(first)


def test_a_sample_of_mnli_has_one_column():
    _, cells = grid(axes={"task": ["mnli"], "seed": list(SEEDS)}, settings={"model": "m", "budget": "1%"})
    sample = {cells[0].id: done(cells[0], 0.5)}
    assert [c.label for c in columns_of(cells, sample, Protocol())] == ["mnli"]
    assert [c.label for c in columns_of(cells, {}, Protocol())] == ["mnli-m", "mnli-mm"]
    assert [c.metric for c in columns_of(cells, {}, Protocol(score="test_f1"))] == ["test_f1"]


def test_the_records_of_figures_are_the_papers_runs():
    sweep, cells = grid()
    found = records(cells, results(cells), sweep.protocol, sweep.choice)
    assert len(found) == 16  # There are two tasks, two budgets and four pairs.
    mnli = next(r for r in found if r["task"] == "mnli")
    assert mnli["best"] == 3
    assert list(mnli["columns"]) == ["mnli-m", "mnli-mm"]
    ours = records(cells, results(cells), Protocol(kind="seeds", pair="lr"), sweep.choice)
    assert {r["lr"] for r in ours if r["task"] == "mnli"} == {7e-4}
    assert "best" not in ours[0]


def test_repeat_s_counts_all_weights_that_it_ever_tuned_and_its_budget_is_b():
    sweep, cells = grid(
        axes={"task": ["rte"], "seed": [7]}, settings={"model": "m", "budget": 100}, choose=None,
        methods={"repeat_d3": {"settings": {"method": "repeat_d3"}, "grid": {"lr": ["3e-4"]}}},
    )  # fmt: skip
    method = {"name": "repeat_d3", "strategy": "repeat", "leaving": "kept"}
    known = {cells[0].id: done(cells[0], 0.5, method=method, used=640)}
    (made,) = records(cells, known, sweep.protocol, sweep.choice)
    assert (made["budget"], made["trained"], made["share"]) == (100, 640, 0.64)
    assert tables(cells, known, sweep.protocol)[0].lines[0].entries["rte"].trained == 640


def test_printed_figures_are_shown_as_printed():
    claim = Claim("id3", None, "103K", {"a": "88.3 0.39", "b": "90.00"}, "89.15")
    assert claim_text(claim, "a") == "88.3 ± 0.39"
    assert (claim_text(claim, "b"), claim_text(claim, "c"), claim_text(None, "a")) == ("90.00", "", "")
    assert average_text(claim) == "89.15"


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ([{"method": "id3"}], "claims must be a mapping"),
        ({"rows": [{"method": "id3", "source": "a page"}]}, "unknown key 'source'"),
        ({"rows": [{"method": "id3", "scores": {"rte": "high"}}]}, "'high' of 'id3' must be a printed mean"),
        ({"rows": [{"method": "id3", "scores": {"rte": [88.1, 0.2]}}]}, "must be a printed mean"),
    ],
)
def test_claims_of_another_form_are_refused(claims, message):
    with pytest.raises(ConfigError, match=message):
        grid(claims=claims)
