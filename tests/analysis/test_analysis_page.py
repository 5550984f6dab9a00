"""The example of docs/analysis.md."""

from __future__ import annotations

from pages import run_page


def test_the_example_says_what_the_page_says():
    page = run_page("analysis.md")
    analysis, selection = page["analysis"], page["selection"]
    assert analysis.turnover(page["masks"]) == [0, 0, 0, 0, 0]
    assert len(page["early"]) == 10
    assert analysis.overlap(page["early"], page["masks"][0]).jaccard == 1  # ten a step
    assert analysis.gradient_updates(selection.method, budget=60) == 210
    assert analysis.overlap(analysis.changed(page["base"], page["model"]), selection).jaccard == 1
    assert [shot["used"] for shot in analysis.snapshots(page["delta"], points=3)] == [20, 40, 60]
    assert page["both"].expected == 60 * 60 / sum(tensor.numel() for tensor in page["base"].values())
