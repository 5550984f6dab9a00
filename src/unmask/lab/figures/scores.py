"""Draws scores for each task: over eps and exp, along a run, over budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from statistics import fmean
from typing import Any

from unmask.errors import DataError
from unmask.lab.figures.charts import (
    averaged,
    by_budget,
    count_axis,
    counting,
    draw_course,
    draw_points,
    draw_spread,
    legend_outside,
    metric_name,
    note,
    panels,
    point,
    short,
    which_runs,
)
from unmask.lab.figures.records import RunRecord, check_records, grouped, labels, trained
from unmask.lab.figures.style import LIGHT, LINES, RED, Figure, Look, Style, dress, look_of, new_figure


def parameter_sweep(
    records: Iterable[Mapping[str, Any]], style: Style = LIGHT, eps: float = 1.0, exp: float = 2.0
) -> Figure:
    """Draws Figure 4, two sweeps of one parameter each: (a) the score over eps, at one exp; (b) over exp, at one eps.

    A row of panels is a sweep, a column is a task; a row with a single value is left out. Both axes are linear. The
    methods' names do not count, because they may tell the values apart.

    Args:
        records: Runs of one method whose ``parameters`` hold ``eps`` and ``exp``.
        style: The colours of the page.
        eps: The eps at which values of exp are compared; the default is the paper's setting (Table 7a).
        exp: The exp at which values of eps are compared; the default is the paper's setting for understanding tasks.

    Raises:
        DataError: There are no records, one lacks a parameter, neither parameter has several values, or runs of one
            place cannot be averaged.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records, "parameters")
    for run in runs:
        lacking = [name for name in ("eps", "exp") if name not in run["parameters"]]
        if lacking:
            raise DataError(f"run {run['name']!r} lacks parameter {lacking[0]!r}; give the runs of a sweep over it.")
    rows = {"eps": [r for r in runs if _value(r, "exp") == exp], "exp": [r for r in runs if _value(r, "eps") == eps]}
    sweeps = {name: row for name, row in rows.items() if len({_value(run, name) for run in row}) > 1}
    if not sweeps:
        tried = {name: sorted({_value(run, name) for run in runs}) for name in rows}
        raise DataError(
            f"there is no sweep at exp = {exp:g} or at eps = {eps:g}: the runs have eps {tried['eps']} and exp "
            f"{tried['exp']}; give runs that differ in one of them, or another eps or exp to compare at."
        )
    captions = {"eps": ("a", f"eps, at exp = {exp:g}"), "exp": ("b", f"exp, at eps = {eps:g}")}
    tasks = grouped(runs, "model", "task")
    figure = new_figure(3.3 * len(tasks) + 0.5, 2.8 * len(sweeps) + 0.3, style)
    grid = figure.subplots(len(sweeps), len(tasks), squeeze=False, sharey="col")
    for row, (name, swept) in zip(grid, sweeps.items(), strict=True):
        letter, label = captions[name]
        for axes, ((model, task), of_task) in zip(row, tasks.items(), strict=True):
            axes.set_title(f"({letter}) {task} · {model}", loc="left", fontsize=9, color=style.ink)
            axes.set_xlabel(label)
            axes.set_ylabel(metric_name(of_task[0]))
            its = grouped(swept, "model", "task").get((model, task), [])
            group = [run for run in its if math.isfinite(_value(run, name))]
            draw_points(axes, averaged(group, partial(_value, parameter=name)), look_of(["id3"])["id3"])
            axes.locator_params(axis="x", nbins=5)
            dress(axes, style, grid="y")
    for axes in grid[0]:  # The panels of a task share their y axis.
        _finish(axes, style)
    endless = any(math.isinf(_value(run, name)) for name, swept in sweeps.items() for run in swept)
    beyond = len(runs) - len({run["name"] for swept in sweeps.values() for run in swept})
    texts = ["infinite values have no place on a linear axis"] if endless else []
    texts += [f"{beyond} runs at other values of both are not shown"] if beyond else []
    note(figure, style, which_runs(runs), *texts)
    return figure


def _value(run: RunRecord, parameter: str) -> float:
    return float(run["parameters"][parameter])


def score_along_run(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Figure:
    """Draws Figure 5: the score along a run of increment-S over its updated weights, and repeat-S as a red line.

    Every checkpoint of an increment-S run is a model of a smaller budget, so the run is a curve: thin for each seed
    and thick for their mean, or with ``best`` the curve of the run with the highest score. Repeat-S changes more
    weights than its budget, so it is a line across; its label says how many weights it changes. A static method is a
    point at its budget. The axis is linear.

    Args:
        records: The runs; those with ``strategy`` ``"increment"`` need a ``curve``.
        style: The colours of the page.

    Raises:
        DataError: There is no increment-S run, a record lacks an entry, or runs of one place cannot be averaged.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records, "strategy")
    moving = [run for run in runs if run["strategy"] == "increment"]
    if not moving:
        raise DataError(
            "no run has strategy 'increment', and only such a run's checkpoints are models of smaller budgets."
        )
    check_records(moving, "curve")
    looks, names = look_of(list(grouped(runs, "method"))), labels(runs)

    def draw(axes: Any, group: list[RunRecord]) -> None:
        of = {s: [run for run in group if run["strategy"] == s] for s in ("increment", "repeat")}
        still = [run for run in group if run["strategy"] not in of]
        for method, its in grouped(of["increment"], "method").items():
            _curves(axes, names[method], its, looks[method])
        _lines(axes, still, looks, {run["method"]: run["method"] for run in still})
        count_axis(axes)
        axes.set_xlim(0, 1.02 * axes.dataLim.x1 if axes.lines else None)
        for method, its in grouped(of["repeat"], "method").items():
            _across(axes, names[method], its)
        axes.set_xlabel("number of updated weights")
        _finish(axes, style)

    figure = panels(runs, style, draw)
    best = any(run.get("best", 1) > 1 for run in moving)
    line = "curve: the checkpoints of the run with the highest score" if best else ""
    note(figure, style, line, which_runs(runs))
    return figure


def budget_sweep(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Figure:
    """Draws Figure 6: the score over the budget B, a line for increment-S and one for repeat-S, on a linear axis.

    Where repeat-S keeps what it tuned, it changes more weights than B: its label says so, and a note says how many.

    Args:
        records: The runs (`unmask.lab.figures.RunRecord`).
        style: The colours of the page.

    Raises:
        DataError: There are no records, one lacks an entry, or runs of one place cannot be averaged.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records)
    looks, names = look_of(list(grouped(runs, "method"))), labels(runs)

    def draw(axes: Any, group: list[RunRecord]) -> None:
        more = {run["method"]: " (tunes more than B)" for run in group if trained(run) > run["budget"]}
        shown = {run["method"]: names[run["method"]] + more.get(run["method"], "") for run in group}
        _lines(axes, group, looks, shown)
        count_axis(axes, [run["budget"] for run in group])
        axes.set_xlabel("budget B, weights")
        _finish(axes, style)

    texts = []
    for method, group in grouped(runs, "method").items():
        counts = [trained(run) for run in group if trained(run) > run["budget"]]
        if counts:
            span = " to ".join(dict.fromkeys((short(min(counts)), short(max(counts)))))
            texts.append(f"{names[method]} changes {span} weights in all, more than its budget B")
    figure = panels(runs, style, draw)
    note(figure, style, *texts, which_runs(runs))
    return figure


def _lines(axes: Any, runs: Sequence[RunRecord], looks: Mapping[str, Look], names: Mapping[str, str]) -> None:
    """Draws the scores over the budget, a line for each method. They stand a little apart, at most 12 points in all."""
    methods = grouped(runs, "method")
    step = min(3.0, 12 / max(1, len(methods) - 1))
    for i, (method, group) in enumerate(methods.items()):
        points = averaged(group, itemgetter("budget"))
        draw_points(axes, points, looks[method], names[method], step * (i - (len(methods) - 1) / 2))


def _across(axes: Any, name: str, runs: Sequence[RunRecord]) -> None:
    """Draws a red line across for each budget."""
    right = axes.get_xlim()[1]
    for i, (label, group) in enumerate(by_budget(runs, name)):
        at = point(0.99 * right, group)
        tuned = short(fmean(map(trained, counting(group))))
        dashes = LINES[1:][i % 3]
        axes.axhline(at.mean, color=RED, linewidth=1.4, linestyle=dashes, zorder=2, label=f"{label}, {tuned} tuned")
        draw_spread(axes, at, RED)


def _curves(axes: Any, name: str, runs: Sequence[RunRecord], look: Look) -> None:
    """Draws a line for each budget: the mean over seeds in front of each seed's own line, or the best run's line."""
    for i, (label, group) in enumerate(by_budget(runs, name)):
        kept = counting(group)
        if "best" in kept[0]:
            kept = kept[:1]
        curves = [[(at["used"], at["score"]) for at in run["curve"] if at["used"]] for run in kept]
        for curve in curves if len(curves) > 1 else []:
            axes.plot(*zip(*curve, strict=True), color=look.colour, linewidth=0.8, alpha=0.45, zorder=2)
        draw_course(axes, curves, look, LINES[i % len(LINES)], label)


def _finish(axes: Any, style: Style) -> None:
    """Makes room above and below the data, and draws the legend."""
    axes.margins(y=0.08)
    axes.autoscale_view(scalex=False)
    axes.set_ylim(axes.get_ylim())
    legend_outside(axes, style)
