"""Tests that the figures draw what the records say, refuse what cannot be drawn, and are legible on both pages."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import combinations
from statistics import stdev

import pytest

from unmask.errors import DataError
from unmask.lab.figures import (
    DARK,
    FIGURES,
    LIGHT,
    allocation_maps,
    budget_sweep,
    delta_figure,
    parameter_sweep,
    score_against_share,
    score_along_run,
    sparsity_entropy,
    svg,
    tensor_sparsity,
    write_figure,
)
from unmask.lab.figures.style import INK, RED, SERIES, look_of

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.legend import Legend
from matplotlib.text import Text

stats = pytest.importorskip("scipy.stats")

KINDS = ("key", "query", "value", "attention output", "ffn1", "ffn2")
RATES = (1e-4, 3e-4, 5e-4, 7e-4)
ROWS = [
    {"layer": layer, "kind": kind, "unmasked": n, "of": 100}
    for layer, kind, n in [("10", "value", 30), ("2", "query", 10), ("2", "other", 5), ("other", "other", 5)]
]


def shot(step: int, used: int, sparsity: float, **more) -> dict:
    return {
        "step": step, "used": used, "tensor_sparsity": sparsity, "sparsity_entropy": 1 + sparsity, "tensors": 9,
        "rows": [{**row, "unmasked": row["unmasked"] * used // 50} for row in ROWS], **more,
    }  # fmt: skip


def run(method: str = "id3", budget: int = 1000, seed: int = 0, score: float = 0.8, **more) -> dict:
    return {
        "name": f"{method}-{budget}-{seed}", "method": method, "task": "sst2", "model": "m", "budget": budget,
        "share": budget / 100_000, "seed": seed, "lr": 1e-3, "score": score, "metric": "accuracy", **more,
    }  # fmt: skip


def best_runs(scores: tuple[float, ...], **more) -> list[dict]:
    """Returns the paper's four runs at one place: each has its own seed and rate, and the best three count."""
    pairs = zip(range(6, 10), RATES, scores, strict=True)
    return [run(seed=seed, score=score, best=3, **more) | {"lr": lr} for seed, lr, score in pairs]


def all_runs() -> list[dict]:
    runs = []
    for seed in (0, 1, 2):
        curve = [{"step": i, "used": 250 * i, "score": 0.5 + 0.05 * i + 0.01 * seed} for i in range(5)]
        course = [shot(1, 50, 0.9), shot(4, 1000, 0.25)]
        more = {"parameters": {"eps": 1.0, "exp": 2.0}, "curve": curve, "allocation": course}
        runs.append(run(seed=seed, score=0.7 + 0.01 * seed, strategy="increment", **more))
        runs.append(run("repeat_d3", seed=seed, score=0.6, strategy="repeat", trained=7000, **more))
    return runs


def sweep_runs() -> list[dict]:
    """Returns a run for each pair of eps and exp."""
    return [
        run(score=0.5 + eps / 10 + exp / 100, parameters={"eps": eps, "exp": exp}) | {"name": f"{eps} {exp}"}
        for eps in (0.0, 0.5, 1.0)
        for exp in (-1.0, 2.0)
    ]


def runs_of(figure: str) -> list[dict]:
    return sweep_runs() if figure == "fig4" else all_runs()


def lines_of(axes, colour: str) -> list:
    return [line for line in axes.lines if line.get_color() == colour]


def note_of(figure) -> str:
    """Returns the text below the panels, without its line breaks."""
    return figure.get_supxlabel().replace("\n", " ")


def legend_of(axes) -> list[str]:
    return [text.get_text() for legend in axes.findobj(Legend) for text in legend.get_texts()]


def markers_of(axes) -> list[tuple[float, float, float]]:
    """Returns x, y and area of every marker of a scatter."""
    return [(*c.get_offsets()[0], c.get_sizes()[0]) for c in axes.collections]


def test_importing_the_figures_imports_neither_torch_nor_matplotlib():
    code = "import sys, unmask.lab.figures; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        == ["False"] * 2
    )


def linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def contrast(a: str, b: str) -> float:
    weights = (0.2126, 0.7152, 0.0722)
    low, high = sorted(sum(w * c for w, c in zip(weights, linear(colour), strict=True)) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: list[float]) -> tuple[float, float, float]:
    # The rows give X, Y and Z, each divided by that of white.
    rows = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8728))
    xyz = (max(0.0, sum(w * c for w, c in zip(row, rgb, strict=True))) for row in rows)
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


SIGHT = {  # how linear RGB is seen without red and without green cones (Machado et al. 2009)
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}


@pytest.mark.parametrize("sight", SIGHT)
def test_colour_blind_readers_can_tell_the_colours_apart(sight):
    seen = [
        lab([sum(w * c for w, c in zip(row, linear(colour), strict=True)) for row in SIGHT[sight]]) for colour in SERIES
    ]
    assert min(math.dist(a, b) for a, b in combinations(seen, 2)) > 15


def test_colours_stand_out_on_a_light_and_on_a_dark_page():
    for page in (LIGHT, DARK):
        assert min(contrast(colour, page.paper) for colour in SERIES) >= 3
        assert contrast(page.ink, page.paper) >= 7
        assert contrast(page.muted, page.paper) >= 4.5


def test_variants_of_a_method_share_a_colour_and_differ_in_marker_and_line():
    looks = look_of(["id3", "id3 exp=0", "id3 stride 10", "lora", "made up"])
    assert len({looks[m].colour for m in ("id3", "id3 exp=0", "id3 stride 10")}) == 1
    assert len({(looks[m].marker, looks[m].line) for m in ("id3", "id3 exp=0", "id3 stride 10")}) == 3
    assert looks["lora"].colour == look_of(["shira", "lora"])["lora"].colour


GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")


def glue_runs(method: str, budget: int, score: float, tasks: tuple[str, ...] = GLUE_TASKS) -> list[dict]:
    """Returns a run per task. MNLI's second column is 0.09 lower, so the average of nine is 0.01 below the score."""
    both = {"mnli-m": score, "mnli-mm": score - 0.09}
    return [
        run(method, budget, score=score, **({"columns": both} if task == "mnli" else {})) | {"task": task}
        for task in tasks
    ]


def test_figure_1_shows_the_average_of_all_columns_over_the_share_in_percent():
    runs = glue_runs("id3", 100, 0.81) + glue_runs("id3", 400, 0.85) + glue_runs("full", 100_000, 0.9)
    figure = score_against_share(runs)
    (axes,) = figure.axes
    (x, y, small), (x4, y4, large) = markers_of(axes)
    assert (x, x4) == (pytest.approx(0.1), pytest.approx(0.4))
    assert (y, y4) == (pytest.approx(80), pytest.approx(84))
    assert large == pytest.approx(4 * small)  # the area is proportional to the count of trained weights
    assert [list(line.get_ydata()) for line in axes.lines] == [[pytest.approx(89)] * 2]
    assert (axes.get_xscale(), axes.get_xlim()[0], axes.get_ylabel()) == ("linear", 0, "GLUE average, %")
    assert sorted(legend_of(axes)) == ["100", "400", "full, 100K weights", "id3"]
    assert "average of 9 columns: cola, mnli-m, mnli-mm, mrpc" in note_of(figure)


def test_figure_1_takes_the_trained_weights_and_not_the_budget():
    runs = [run("repeat_d3", 1000, seed=s, trained=7000 + 1000 * s) | {"share": 0.07 + 0.01 * s} for s in (0, 1, 2)]
    (axes,) = score_against_share(runs).axes
    assert [x for x, _, _ in markers_of(axes)] == [pytest.approx(8)]
    assert legend_of(axes) == ["repeat_d3", "8K"]


@pytest.mark.parametrize(
    ("tasks", "label", "note"),
    [
        (("rte", "mrpc"), "GLUE average, %", "average of 2 of GLUE's 9 columns: rte, mrpc"),
        (("rte", "mine"), "average over 2 tasks, %", "average of 2 columns: rte, mine"),
        (("rte",), "accuracy, %", ""),
    ],
)
def test_figure_1_says_what_is_averaged(tasks, label, note):
    figure = score_against_share([run() | {"task": task} for task in tasks])
    assert (figure.axes[0].get_ylabel(), note_of(figure)) == (label, note)


def test_figure_1_chooses_the_best_runs_column_by_column():
    runs = best_runs((0.1, 0.4, 0.5, 0.6), method="id3")
    second = (0.9, 0.0, 0.9, 0.9)  # in this column the first run is among the best and the second is not
    runs = [r | {"columns": {"a": r["score"], "b": value}} for r, value in zip(runs, second, strict=True)]
    figure = score_against_share(runs)
    (axes,) = figure.axes
    assert [y for _, y, _ in markers_of(axes)] == [pytest.approx((50 + 90) / 2)]
    assert not list(axes.lines)  # an average of several columns has no deviation
    assert "means of the best 3 runs" in note_of(figure)
    assert "vertical" not in note_of(figure)


def test_figure_1_draws_a_method_only_where_it_has_all_columns():
    runs = glue_runs("id3", 100, 0.8) + glue_runs("bitfit", 100, 0.9, tasks=GLUE_TASKS[:-1])
    figure = score_against_share(runs)
    assert [y for _, y, _ in markers_of(figure.axes[0])] == [pytest.approx(79)]
    assert len(markers_of(score_against_share([*runs, run("pafi", columns={})]).axes[0])) == 1
    assert "left out of m, because columns are lacking: bitfit at 100 (stsb)" in note_of(figure)
    apart = [run("id3"), run("lora") | {"task": "rte"}]
    with pytest.raises(DataError, match=r"no method has a score in every column of m; .* id3 at 1K \(rte\)"):
        score_against_share(apart)


def test_figure_1_takes_budgets_that_differ_by_the_size_of_a_head_as_one():
    runs = [run(budget=1000) | {"task": "rte"}, run(budget=1001) | {"task": "mnli"}, run(budget=1100) | {"task": "rte"}]
    figure = score_against_share(runs)
    assert len(markers_of(figure.axes[0])) == 1
    assert "id3 at 1.1K (mnli)" in note_of(figure)


def test_points_are_means_over_seeds_with_their_interval():
    runs = [run(budget=b, seed=s, score=b / 10_000 + 0.01 * s) for b in (1000, 5000) for s in (0, 1, 2)]
    for figure, x, scale in ((score_against_share(runs), (1, 5), 100), (budget_sweep(runs), (1000, 5000), 1)):
        (axes,) = figure.axes
        spreads = [line for line in lines_of(axes, look_of(["id3"])["id3"].colour) if line.get_alpha()]
        half = stats.t.ppf(0.975, 2) * 0.01 / 3**0.5  # 0.975 = (1 + 0.95) / 2
        for line, place, mean in zip(spreads, x, (0.11, 0.51), strict=True):
            assert list(line.get_xdata()) == pytest.approx([place] * 2)
            assert list(line.get_ydata()) == pytest.approx([scale * (mean - half), scale * (mean + half)])
        bottom, top = axes.get_ylim()
        assert bottom < scale * (0.11 - half)
        assert top > scale * (0.51 + half)
        assert "95% interval" in note_of(figure)
        assert axes.get_title(loc="left") == "sst2 · m"


def test_the_best_runs_have_their_deviation_and_not_an_interval():
    runs = best_runs((0.3, 0.5, 0.7, 0.6), budget=1000) + best_runs((0.9, 0.1, 0.2, 0.3), budget=2000)
    figure = budget_sweep(runs[:-1])  # the fourth run at 2000 is missing
    (axes,) = figure.axes
    means, *spreads = axes.lines
    assert list(means.get_ydata()) == pytest.approx([0.6, 0.4])
    half = stdev([0.9, 0.1, 0.2])
    assert [list(line.get_ydata()) for line in spreads] == [
        pytest.approx([0.5, 0.7]), pytest.approx([0.4 - half, 0.4 + half])]  # fmt: skip
    assert "best 3 runs of each setting; runs differ in seed and learning rate" in note_of(figure)
    assert "plus and minus their standard deviation" in note_of(figure)
    (axes,) = budget_sweep(runs[:1]).axes
    assert len(axes.lines) == 1  # one run has no deviation
    figure = budget_sweep([r | {"best": 1} for r in runs])
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.7, 0.9]
    assert note_of(figure) == "the best run of each setting; runs differ in seed and learning rate"


def test_the_budget_sweep_has_counts_on_a_linear_axis():
    budgets = (80_000, 160_000, 320_000, 640_000)
    runs = [run("id3", b, strategy="increment") for b in budgets]
    runs += [run("repeat_d3", b, score=0.5, strategy="repeat", trained=7 * b) for b in budgets]
    figure = budget_sweep(runs)
    (axes,) = figure.axes
    assert (axes.get_xscale(), list(axes.get_xticks())) == ("linear", list(budgets))
    assert [axes.xaxis.get_major_formatter()(b) for b in budgets] == ["80K", "\n160K", "320K", "640K"]
    assert [list(line.get_xdata()) for line in axes.lines] == [list(budgets)] * 2
    assert sorted(legend_of(axes)) == ["increment-S", "repeat-S (tunes more than B)"]
    assert "repeat-S changes 560K to 4.48M weights in all" in note_of(figure)
    (axes,) = budget_sweep([{**r, "trained": r["budget"]} for r in runs]).axes
    assert sorted(legend_of(axes)) == ["increment-S", "repeat-S"]


def test_methods_have_their_own_names_where_several_have_one_strategy():
    runs = [*all_runs(), *({**r, "method": "snip"} for r in all_runs() if r["method"] == "id3")]
    (axes,) = tensor_sparsity(runs).axes
    assert sorted(legend_of(axes)) == ["id3", "repeat_d3", "snip"]


def test_the_curve_of_a_run_is_its_mean_over_seeds_by_updated_weights():
    static = run("pafi", 500, strategy="static", score=0.65)
    (axes,) = score_along_run([*all_runs(), static]).axes
    *seeds, mean = [line for line in lines_of(axes, look_of(["id3"])["id3"].colour) if len(line.get_xdata()) == 4]
    assert len(seeds) == 3
    assert list(mean.get_xdata()) == [250, 500, 750, 1000]  # nothing is unmasked at step 0
    assert list(mean.get_ydata()) == pytest.approx([0.56, 0.61, 0.66, 0.71])
    (across,) = [line for line in lines_of(axes, RED) if line.get_linestyle() == "--"]
    assert list(across.get_ydata()) == pytest.approx([0.6, 0.6])
    assert list(across.get_xdata()) == [0, 1]  # in units of the axes, so it goes from the left to the right end
    (point,) = lines_of(axes, look_of(["pafi"])["pafi"].colour)
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([500], [0.65])
    assert sorted(legend_of(axes)) == ["increment-S", "pafi", "repeat-S, 7K tuned"]
    assert (axes.get_xscale(), axes.get_xlim()[0], axes.get_xlabel()) == ("linear", 0, "number of updated weights")


def test_repeat_s_and_increment_s_have_a_line_for_each_budget():
    other = [{**r, "budget": 2000, "trained": 2 * r.get("trained", 1000)} for r in all_runs()]
    (axes,) = score_along_run([*all_runs(), *other]).axes
    assert sorted(legend_of(axes)) == [
        "increment-S, B = 1K", "increment-S, B = 2K", "repeat-S, B = 1K, 7K tuned", "repeat-S, B = 2K, 14K tuned",
    ]  # fmt: skip
    moving = [line for line in axes.lines if line.get_label().startswith("increment-S")]
    assert {line.get_linestyle() for line in moving} == {"-", "--"}  # the legend tells the budgets apart
    only = [r for r in all_runs() if r["strategy"] == "repeat"]
    with pytest.raises(DataError, match="no run has strategy 'increment'"):
        score_along_run(only)


def test_the_curve_of_the_best_runs_is_that_of_the_run_with_the_highest_score():
    runs = best_runs((0.5, 0.8, 0.6, 0.7), strategy="increment")
    runs = [r | {"curve": [{"step": 1, "used": u, "score": r["score"] - u / 1e4} for u in (500, 1000)]} for r in runs]
    figure = score_along_run(runs)
    (curve,) = figure.axes[0].lines
    assert list(curve.get_ydata()) == pytest.approx([0.75, 0.7])
    assert "the run with the highest score" in note_of(figure)


def test_the_parameter_sweep_has_a_row_for_each_parameter_at_one_value_of_the_other():
    runs = [r | {"task": task, "metric": metric} for task, metric in (("cola", "matthews"), ("rte", "accuracy"))
            for r in sweep_runs()]  # fmt: skip
    figure = parameter_sweep(runs)
    eps, _, exp, _ = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "(a) cola · m", "(a) rte · m", "(b) cola · m", "(b) rte · m"]  # fmt: skip
    assert [axes.get_ylabel() for axes in figure.axes] == ["Matthews correlation", "accuracy"] * 2
    assert (eps.get_xlabel(), exp.get_xlabel()) == ("eps, at exp = 2", "exp, at eps = 1")
    assert {axes.get_xscale() for axes in figure.axes} == {"linear"}
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in eps.lines] == [
        ([0, 0.5, 1], pytest.approx([0.52, 0.57, 0.62]))]  # fmt: skip
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in exp.lines] == [
        ([-1, 2], pytest.approx([0.59, 0.62]))]  # fmt: skip
    assert eps.get_ylim() == exp.get_ylim()
    named = [r | {"method": f"eps {r['parameters']['eps']}"} for r in sweep_runs()]  # each value has its own method
    assert list(parameter_sweep(named).axes[0].lines[0].get_xdata()) == [0, 0.5, 1]
    with pytest.raises(DataError, match="two runs of one seed"):
        parameter_sweep([*sweep_runs(), *({**r, "method": "static_d3"} for r in sweep_runs())])
    assert "2 runs at other values of both are not shown" in note_of(parameter_sweep(sweep_runs()))


def test_the_parameter_sweep_compares_at_other_values_and_leaves_out_a_row_without_a_sweep():
    (axes,) = parameter_sweep([r for r in sweep_runs() if r["parameters"]["exp"] == -1], exp=-1).axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.49, 0.54, 0.59])
    endless = run(parameters={"eps": math.inf, "exp": 2.0})
    figure = parameter_sweep([*sweep_runs(), endless])
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 0.5, 1]
    assert "infinite values" in note_of(figure)
    lone = run(parameters={"eps": 0.5, "exp": 2.0}) | {"task": "rte"}  # its task has a point in one of the sweeps
    _, eps, _, exp = parameter_sweep([*sweep_runs(), lone]).axes
    assert ([len(line.get_xdata()) for axes in (eps, exp) for line in axes.lines]) == [1, 0]
    with pytest.raises(DataError, match=r"no sweep at exp = 0 or at eps = 9: the runs have eps \[0.0, 0.5, 1.0\]"):
        parameter_sweep(sweep_runs(), exp=0, eps=9)
    with pytest.raises(DataError, match="lacks parameter 'exp'"):
        parameter_sweep([run(parameters={"eps": 1})])


def heat(axes) -> dict[tuple[float, float], str]:
    """Returns the text of each of a map's cells, by (column, row)."""
    return {text.get_position(): text.get_text() for text in axes.texts}


def test_figure_7_has_kinds_by_layers_and_shares_of_the_budget():
    figure = allocation_maps([r | {"name": f"{r['method']}"} for r in all_runs() if r["seed"] == 0])
    maps, bars = figure.axes[:4], figure.axes[4:]
    titles = [axes.get_title(loc="left").split("\n") for axes in maps]
    assert [first for first, *_ in titles] == [
        "(a) increment-S, start · sst2 · m", "(b) increment-S, end · sst2 · m",
        "(c) repeat-S, start · sst2 · m", "(d) repeat-S, end · sst2 · m",
    ]  # fmt: skip
    assert titles[0][1:] == ["step 1: 50 of B = 1K", "elsewhere 0.01"]
    assert titles[1][1:] == ["step 4: 1K of B = 1K", "elsewhere 0.2"]
    for axes in maps:
        assert [t.get_text() for t in axes.get_yticklabels()] == ["Key", "Query", "Value", "Attn Out", "FFN1", "FFN2"]
        assert [t.get_text() for t in axes.get_xticklabels()] == ["L=3", "L=11"]
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # Key is at the top
    assert heat(maps[0]) == {(0, 1): "0.01", (1, 2): "0.03"}
    assert heat(maps[1]) == {(0, 1): "0.2", (1, 2): "0.6"}
    assert [bar.get_ylim() for bar in bars] == [(0, 0.03), (0, 0.6)] * 2  # each panel has its own colour scale
    assert maps[0].images[0].get_array()[2, 1] == pytest.approx(0.03)


def test_the_cells_and_the_share_elsewhere_add_up_to_the_unmasked_share_of_the_budget():
    rows = [
        {"layer": layer, "kind": kind, "unmasked": 7 * i + j, "of": 900}
        for i, layer in enumerate([*map(str, range(12)), "other"])
        for j, kind in enumerate([*KINDS, "other"])
    ]
    used = sum(row["unmasked"] for row in rows)
    figure = allocation_maps([run(budget=2 * used, allocation=[shot(1, used, 0.5, rows=rows)])])
    start, end, *_ = figure.axes
    elsewhere = float(start.get_title(loc="left").rsplit(" ", 1)[1])
    assert start.images[0].get_array().sum() + elsewhere == pytest.approx(0.5, abs=0.0005)
    assert [t.get_text() for t in end.get_xticklabels()] == [f"L={n}" for n in range(1, 13)]


def test_the_map_of_repeat_s_shows_the_weights_that_the_step_picked():
    more = {"picked": [{"layer": "0", "kind": "key", "unmasked": 50, "of": 100}]}
    runs = [run("repeat_d3", 50, allocation=[shot(1, 50, 0.9, **more), shot(4, 1000, 0.2, **more)])]
    _, end, *_ = allocation_maps(runs).axes
    assert heat(end) == {(0, 0): "1"}
    assert end.get_title(loc="left").endswith("step 4: 50 of B = 50, 1K ever tuned\nelsewhere 0")


def test_one_method_has_two_maps_and_further_tasks_and_budgets_are_further_rows():
    alone = [run(allocation=[shot(4, 1000, 0.2), shot(1, 50, 0.9)])]
    start, end, *bars = allocation_maps(alone).axes
    assert len(bars) == 2
    assert start.get_title(loc="left").startswith("(a) id3, start")  # the first step comes second in the list
    assert end.get_title(loc="left").startswith("(b) id3, end")
    more = [*alone, alone[0] | {"task": "rte"}, alone[0] | {"budget": 2000}]
    assert [axes.get_title(loc="left")[:3] for axes in allocation_maps(more).axes[:6]] == ["(a)", "(b)"] * 3
    with pytest.raises(DataError, match="no snapshot with an unmasked weight"):
        allocation_maps([run(allocation=[shot(0, 0, 1.0)])])
    with pytest.raises(DataError, match="none of the tensors lies in a layer"):
        allocation_maps([run(allocation=[shot(1, 5, 0.5, rows=ROWS[-1:])])])


def test_maps_of_seeds_are_averaged():
    runs = [run(seed=s, allocation=[shot(1, used, 0.5)]) for s, used in ((0, 100), (1, 300))]
    start, *_ = allocation_maps(runs).axes
    assert heat(start) == {(0, 1): "0.04", (1, 2): "0.12"}
    assert "200 of B = 1K" in start.get_title(loc="left")


def test_the_percentages_in_the_map_of_a_delta_add_up_to_a_hundred():
    tensors = {"a": {"changed": 1, "of": 2, "density": 0.5}}
    axes, *_ = delta_figure({"allocation": ROWS, "tensors": tensors, "weights": 50, "along": []}).axes
    assert sum(float(text) for text in heat(axes).values()) == pytest.approx(100)
    assert [t.get_text() for t in axes.get_yticklabels()][-2:] == ["FFN2", "other"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["L=3", "L=11", "outside"]
    assert heat(axes) == {(1, 2): "60", (0, 1): "20", (0, 6): "10", (2, 6): "10"}


def test_courses_are_means_over_seeds_on_an_axis_from_0_to_1():
    (axes,) = tensor_sparsity(all_runs()).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([0.9, 0.25])] * 2
    assert (axes.get_ylim(), axes.get_ylabel()) == ((0, 1), "tensor sparsity")
    assert axes.get_xlabel() == "training iteration (optimizer step)"
    assert sorted(legend_of(axes)) == ["increment-S", "repeat-S"]
    (axes,) = sparsity_entropy(all_runs()).axes
    assert list(axes.lines[0].get_xdata()) == [1, 4]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([1.9 / math.log(9), 1.25 / math.log(9)])
    assert (axes.get_ylim(), axes.get_ylabel()) == ((0, 1), "sparsity entropy / ln(tensors)")
    with pytest.raises(DataError, match="needs at least 2"):
        sparsity_entropy([run(allocation=[shot(1, 50, 0.5, tensors=1)])])


def test_courses_of_two_budgets_are_two_lines_and_the_best_runs_count():
    runs = [run(budget=b, allocation=[shot(1, 50, b / 10_000)]) for b in (1000, 2000)]
    (axes,) = tensor_sparsity(runs).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([0.1]), pytest.approx([0.2])]
    assert sorted(legend_of(axes)) == ["id3, B = 1K", "id3, B = 2K"]
    runs = [r | {"allocation": [shot(1, 50, r["score"])]} for r in best_runs((0.3, 0.4, 0.5, 0.9))]
    (axes,) = tensor_sparsity(runs).axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.6])


def _titles(axes) -> list:
    return [text for text in axes.findobj(Text) if text.get_text() == axes.get_title(loc="left")]


def _shown_ticks(axes) -> list:
    low, high = axes.get_xlim()
    return [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]


@pytest.mark.parametrize("figure", FIGURES)
def test_texts_lie_in_the_figure_and_do_not_touch(figure):
    drawn = FIGURES[figure](runs_of(figure))
    FigureCanvasAgg(drawn).draw()
    texts = [t for axes in drawn.axes for t in (*axes.texts, *_titles(axes), *_shown_ticks(axes))]
    texts += [t for axes in drawn.axes for legend in axes.findobj(Legend) for t in legend.get_texts()]
    boxes = [t.get_window_extent() for t in texts if t.get_text()]
    width, height = drawn.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert len(boxes) > 3
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]


def test_the_figure_has_room_for_a_long_method_name():
    figure = score_against_share([run("a method with a rather long name")])
    FigureCanvasAgg(figure).draw()
    (legend, _) = figure.axes[0].findobj(Legend)
    assert legend.get_window_extent().x1 <= figure.canvas.get_width_height()[0]


def test_the_numbers_of_a_map_fit_their_cells():
    rows = [{"layer": str(n), "kind": kind, "unmasked": 23 * n + 1, "of": 900} for n in range(12) for kind in KINDS]
    figure = allocation_maps([run(budget=100_000, allocation=[shot(1, 9000, 0.5, rows=rows)])])
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    cell = axes.get_window_extent().width / 12
    assert max(len(text.get_text()) for text in axes.texts) >= 4
    assert max(text.get_window_extent().width for text in axes.texts) < 0.9 * cell


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_refuses_no_runs_and_names_what_a_record_lacks(figure):
    with pytest.raises(DataError, match="no runs to draw"):
        FIGURES[figure]([])
    with pytest.raises(DataError, match="run 'id3-1000-0' lacks share"):
        FIGURES[figure]([{key: value for key, value in run().items() if key != "share"}])


def test_runs_that_are_not_seeds_of_one_setting_are_not_averaged():
    with pytest.raises(DataError, match=r"learning rates \[0.001, 0.01\]"):
        score_against_share([run(seed=0), run(seed=1) | {"lr": 1e-2}])
    with pytest.raises(DataError, match="two runs of one seed;"):
        score_against_share([run(), run() | {"name": "again"}])
    with pytest.raises(DataError, match="two runs of one seed and learning rate"):
        score_against_share([run(best=3), run(best=3) | {"name": "again"}])
    with pytest.raises(DataError, match="different entries 'best'"):
        score_against_share([run(best=3), run(seed=1)])


@pytest.mark.parametrize("figure", FIGURES)
def test_svg_takes_the_pages_colour_of_text_and_is_the_same_every_time(figure):
    first, again = (svg(lambda style: FIGURES[figure](runs_of(figure), style), salt=figure) for _ in range(2))
    assert first == again
    assert first.startswith("<svg")
    assert "currentColor" in first
    assert INK not in first
    assert not re.search(r"(?:href|src)=\"https?:", first)


def test_a_figure_is_written_as_three_files_or_as_the_one_that_is_named(tmp_path):
    def draw(style):
        return score_against_share(all_runs(), style)

    assert [path.name for path in write_figure(draw, tmp_path / "new" / "fig1")] == [
        "fig1.png",
        "fig1-dark.png",
        "fig1.svg",
    ]
    assert [path.name for path in write_figure(draw, tmp_path / "one.svg")] == ["one.svg"]
    assert (tmp_path / "new" / "fig1.png").read_bytes() != (tmp_path / "new" / "fig1-dark.png").read_bytes()
    with pytest.raises(DataError, match=r"\.pdf"):
        write_figure(draw, tmp_path / "fig.pdf")
