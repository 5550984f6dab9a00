"""Figures: what is drawn is what the records say; what cannot be drawn is refused; legible on both pages."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import combinations, pairwise

import pytest

from unmask.errors import DataError
from unmask.figures import (
    DARK,
    FIGURES,
    LIGHT,
    allocation_maps,
    budget_sweep,
    parameter_sweep,
    score_against_share,
    score_along_run,
    sparsity_entropy,
    svg,
    tensor_sparsity,
    write_figure,
)
from unmask.figures.charts import spread
from unmask.figures.intervals import mean_interval, t_quantile
from unmask.figures.style import INK, SERIES, look_of

pytest.importorskip("matplotlib")

ROWS = [
    {"layer": layer, "kind": kind, "unmasked": n, "of": 100}
    for layer, kind, n in [("10", "value", 30), ("2", "query", 10), ("2", "other", 5), ("other", "other", 5)]
]


def shot(step: int, used: int, sparsity: float) -> dict:
    return {
        "step": step, "used": used, "tensor_sparsity": sparsity, "sparsity_entropy": 1 + sparsity, "tensors": 9,
        "rows": [{**row, "unmasked": row["unmasked"] * used // 50} for row in ROWS],
    }  # fmt: skip


def run(method: str = "id3", budget: int = 1000, seed: int = 0, score: float = 0.8, **more) -> dict:
    return {
        "name": f"{method}-{budget}-{seed}", "method": method, "task": "sst2", "model": "m", "budget": budget,
        "share": budget / 100_000, "seed": seed, "lr": 1e-3, "score": score, "metric": "accuracy", **more,
    }  # fmt: skip


def all_runs() -> list[dict]:
    runs = []
    for seed in (0, 1, 2):
        curve = [{"step": i, "used": 250 * i, "score": 0.5 + 0.05 * i + 0.01 * seed} for i in range(5)]
        course = [shot(1, 50, 0.9), shot(4, 1000, 0.25)]
        more = {"parameters": {"eps": 1.0, "exp": 2.0}, "curve": curve, "allocation": course}
        runs.append(run(seed=seed, score=0.7 + 0.01 * seed, strategy="increment", **more))
        runs.append(run("repeat_d3", seed=seed, score=0.6, strategy="repeat", **more))
    return runs


def lines_of(axes, colour: str) -> list:
    return [line for line in axes.lines if line.get_color() == colour]


def labels_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_importing_waits_for_neither_torch_nor_matplotlib():
    code = "import sys, unmask.figures; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        == ["False"] * 2
    )


def test_intervals_are_students():
    stats = pytest.importorskip("scipy.stats")
    values = [0.81, 0.79, 0.84, 0.80]
    low, high = stats.t.interval(0.95, 3, loc=0.81, scale=stats.sem(values))
    mean, half = mean_interval(values)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert mean_interval([0.5]) == (0.5, None)
    with pytest.raises(DataError):
        mean_interval([])


def test_labels_are_moved_apart_and_no_further():
    places = [0.1, 0.11, 0.12, 0.5, 0.9, 0.9]
    moved = spread(places, 0.05)
    assert all(b - a >= 0.05 - 1e-12 for a, b in pairwise(moved))
    assert moved[3] == 0.5
    assert sum(moved[:3]) == pytest.approx(sum(places[:3]))
    assert spread([0.1, 0.4], 0.05) == [0.1, 0.4]


SIGHT = {  # linear RGB as seen without red, and without green cones (Machado et al. 2009)
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}


def linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def contrast(a: str, b: str) -> float:
    weights = (0.2126, 0.7152, 0.0722)
    low, high = sorted(sum(w * c for w, c in zip(weights, linear(colour), strict=True)) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: list[float]) -> tuple[float, float, float]:
    rows = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8728))  # XYZ over that of white
    xyz = (max(0.0, sum(w * c for w, c in zip(row, rgb, strict=True))) for row in rows)
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_stay_apart_for_colour_blind_readers(sight):
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


def test_points_are_means_over_seeds_with_their_interval():
    runs = [run(budget=b, seed=s, score=b / 10_000 + 0.01 * s) for b in (1000, 5000) for s in (0, 1, 2)]
    runs += [run("full", 100_000, 0, 0.9), run("lora", 2000, 0, 0.7) | {"task": "rte"}]
    figure = score_against_share(runs)
    sst2, rte = figure.axes
    means, low, high = lines_of(sst2, look_of(["id3"])["id3"].colour)
    assert list(means.get_xdata()) == [0.01, 0.05]
    assert list(means.get_ydata()) == pytest.approx([0.11, 0.51])
    half = t_quantile(0.95, 2) * 0.01 / 3**0.5
    assert list(low.get_ydata()) == pytest.approx([0.11 - half, 0.11 + half])
    assert list(high.get_ydata()) == pytest.approx([0.51 - half, 0.51 + half])
    bottom, top = sst2.get_ylim()
    assert bottom < 0.11 - half
    assert top > 0.9  # the line across is inside too
    assert sorted(labels_of(sst2)) == ["full", "id3"]
    assert labels_of(rte) == ["lora"]
    assert (sst2.get_ylabel(), sst2.get_title(loc="left")) == ("accuracy", "sst2 · m")


def test_the_budget_sweep_stands_over_counts():
    runs = [run(method, budget, 0, 0.5) for method in ("id3", "repeat_d3") for budget in (1000, 20_000)]
    (axes,) = budget_sweep(runs).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1K", "20K"]


def test_the_curve_of_a_run_is_its_mean_over_seeds_by_unmasked_weights():
    (axes,) = score_along_run(all_runs()).axes
    *seeds, mean = [line for line in lines_of(axes, look_of(["id3"])["id3"].colour) if len(line.get_xdata()) == 4]
    assert len(seeds) == 3
    assert list(mean.get_xdata()) == [250, 500, 750, 1000]  # nothing is unmasked at step 0
    assert list(mean.get_ydata()) == pytest.approx([0.56, 0.61, 0.66, 0.71])
    assert sorted(labels_of(axes)) == ["id3, along the run", "repeat_d3"]
    other = [{**r, "budget": 2000} for r in all_runs() if r["strategy"] == "increment"]
    (axes,) = score_along_run([*all_runs(), *other]).axes
    assert sorted(labels_of(axes)) == ["id3, along the run to 1K", "id3, along the run to 2K", "repeat_d3"]
    only = [r for r in all_runs() if r["strategy"] == "repeat"]
    with pytest.raises(DataError, match="no run has strategy 'increment'"):
        score_along_run(only)


def test_the_parameter_sweep_has_a_line_for_each_other_value():
    runs = [
        run(seed=0, score=0.5 + eps / 10 + exp / 100, parameters={"eps": eps, "exp": exp}) | {"name": f"{eps} {exp}"}
        for eps in (0.01, 0.1, 1.0)
        for exp in (-1.0, 2.0)
    ]
    left, right = parameter_sweep(runs).axes
    assert [list(line.get_ydata()) for line in left.lines] == [
        pytest.approx([0.491, 0.5, 0.59]), pytest.approx([0.521, 0.53, 0.62])]  # fmt: skip
    assert len(right.lines) == 3
    assert labels_of(left) == ["exp -1", "exp 2"]
    with pytest.raises(DataError, match="lacks parameter 'exp'"):
        parameter_sweep([run(parameters={"eps": 1})])


def test_a_heat_map_shows_percentages_that_make_a_hundred():
    figure = allocation_maps([run(allocation=[shot(4, 1000, 0.2), shot(1, 50, 0.9)])])
    start, end = figure.axes
    assert "start: 50 weights" in start.get_title(loc="left")
    assert "end: 1K weights" in end.get_title(loc="left")
    for axes in (start, end):
        assert sum(float(text.get_text()) for text in axes.texts) == pytest.approx(100, abs=0.5)
        assert [tick.get_text() for tick in axes.get_yticklabels()] == ["2", "10", "outside"]
    places = {text.get_position(): text.get_text() for text in start.texts}
    assert places == {(2, 1): "60", (1, 0): "20", (6, 0): "10", (6, 2): "10"}
    with pytest.raises(DataError, match="no snapshot with an unmasked weight"):
        allocation_maps([run(allocation=[shot(0, 0, 1.0)])])


def test_courses_are_means_over_seeds():
    (axes,) = tensor_sparsity(all_runs()).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([90, 25])] * 2
    (axes,) = sparsity_entropy(all_runs()).axes
    assert list(axes.lines[0].get_xdata()) == [1, 4]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([1.9, 1.25])


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_refuses_no_runs_and_names_what_a_record_lacks(figure):
    with pytest.raises(DataError, match="no runs to draw"):
        FIGURES[figure]([])
    with pytest.raises(DataError, match="run 'id3-1000-0' lacks share"):
        FIGURES[figure]([{key: value for key, value in run().items() if key != "share"}])


def test_runs_that_are_not_seeds_of_one_setting_are_not_averaged():
    with pytest.raises(DataError, match=r"learning rates \[0.001, 0.01\]"):
        score_against_share([run(seed=0), run(seed=1) | {"lr": 1e-2}])
    with pytest.raises(DataError, match="two runs of one seed"):
        score_against_share([run(), run() | {"name": "again"}])


@pytest.mark.parametrize("figure", FIGURES)
def test_svg_takes_the_pages_ink_and_is_the_same_every_time(figure):
    runs = [run for run in all_runs() if figure != "fig4" or run["method"] == "id3"]
    first, again = (svg(lambda style: FIGURES[figure](runs, style), salt=figure) for _ in range(2))
    assert first == again
    assert first.startswith("<svg")
    assert "currentColor" in first
    assert INK not in first
    assert not re.search(r"(?:href|src)=\"https?:", first)


def test_three_files_or_the_one_that_is_named(tmp_path):
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
