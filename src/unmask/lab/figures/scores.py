"""Figures of scores for each task: over eps and exp, along a run, over budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from unmask.errors import DataError
from unmask.lab.figures.charts import (
    End,
    Point,
    aside,
    averaged,
    by_task,
    count_axis,
    counting,
    draw_points,
    draw_spread,
    label_ends,
    metric_name,
    note,
    panels,
    point,
    short,
    which_runs,
)
from unmask.lab.figures.records import CurvePoint, RunRecord, by_method, check_records, labels, trained
from unmask.lab.figures.style import LIGHT, LINES, RED, Look, Style, dress, look_of, new_figure


def parameter_sweep(
    records: Iterable[Mapping[str, Any]], style: Style = LIGHT, eps: float = 1.0, exp: float = 2.0
) -> Any:
    """Figure 4: two sweeps of one parameter each: (a) the score over eps, at one exp; (b) over exp, at one eps.

    A row of panels is a sweep, a column a task; a row with a single value is left out. Both axes are linear. The methods' names
    do not count: they may tell the values apart.

    Args:
        records: Runs of one method whose ``parameters`` hold ``eps`` and ``exp``.
        style: Colours of the page.
        eps: At which eps the exps are compared; the paper's setting (Table 7a).
        exp: At which exp the epses are compared; the paper's setting for understanding tasks.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No records, one lacks a parameter, none of the two has several values, or runs of one place are not to be
            averaged.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records, "parameters")
    sweeps = _sweeps(runs, eps, exp)
    captions = {"eps": ("a", f"eps, at exp = {exp:g}"), "exp": ("b", f"exp, at eps = {eps:g}")}
    tasks = by_task(runs)
    figure = new_figure(3.3 * len(tasks) + 0.5, 2.8 * len(sweeps) + 0.3, style)
    grid = figure.subplots(len(sweeps), len(tasks), squeeze=False, sharey="col")
    for row, (name, swept) in zip(grid, sweeps.items(), strict=True):
        letter, label = captions[name]
        for axes, ((model, task), of_task) in zip(row, tasks.items(), strict=True):
            axes.set_title(f"({letter}) {task} · {model}", loc="left", fontsize=9, color=style.ink)
            axes.set_xlabel(label)
            axes.set_ylabel(metric_name(of_task[0]))
            group = [r for r in by_task(swept).get((model, task), []) if math.isfinite(_value(r, name))]
            draw_points(axes, averaged(group, lambda run, name=name: _value(run, name)), look_of(["id3"])["id3"])  # type: ignore[misc]
            axes.locator_params(axis="x", nbins=5)
            dress(axes, style, grid="y")
    for axes in grid[0]:  # the panels of a task share their y axis
        _finish(axes, [], style)
    endless = any(math.isinf(_value(run, name)) for name, swept in sweeps.items() for run in swept)
    beyond = len(runs) - len({run["name"] for swept in sweeps.values() for run in swept})
    note(
        figure,
        style,
        which_runs(runs),
        "infinite values have no place on a linear axis" if endless else "",
        f"{beyond} runs at other values of both are not shown" if beyond else "",
    )
    return figure


def _sweeps(runs: Sequence[RunRecord], eps: float, exp: float) -> dict[str, list[RunRecord]]:
    """The runs of each row, by the parameter that is swept in it."""
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
    return sweeps


def _value(run: RunRecord, parameter: str) -> float:
    return float(run["parameters"][parameter])


def score_along_run(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Any:
    """Figure 5: the score along a run of increment-S over the number of updated weights, repeat-S as a red line across.

    Every checkpoint of an increment-S run is a model of a smaller budget: its curve is a line, thin for each seed and thick for
    their mean, or with ``best`` the curve of the run with the highest score. Repeat-S changes more weights than its budget, so
    it is no point of this axis; its label says how many. A static method is a point at its budget. The axis is linear.

    Args:
        records: Runs; those with ``strategy`` ``"increment"`` need a ``curve``.
        style: Colours of the page.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No increment-S run, a record lacks an entry, or runs of one place are not to be averaged.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records, "strategy")
    moving = [run for run in runs if run["strategy"] == "increment"]
    if not moving:
        raise DataError(
            "no run has strategy 'increment', and only such a run's checkpoints are models of smaller budgets."
        )
    check_records(moving, "curve")
    looks, names = look_of(list(by_method(runs))), labels(runs)

    def draw(axes: Any, group: list[RunRecord]) -> None:
        of = {s: by_method([r for r in group if r["strategy"] == s]) for s in ("increment", "repeat")}
        still = [run for run in group if run["strategy"] not in of]
        ends = [end for m, its in of["increment"].items() for end in _curves(axes, names[m], its, looks[m])]
        ends += _lines(axes, still, lambda run: run["budget"], looks)
        count_axis(axes)
        axes.set_xlim(0, 1.02 * axes.dataLim.x1 if ends else None)
        ends += [end for m, its in of["repeat"].items() for end in _across(axes, names[m], its)]
        axes.set_xlabel("number of updated weights")
        _finish(axes, ends, style)

    figure = panels(runs, style, draw)
    best = any(run.get("best", 1) > 1 for run in moving)
    line = "curve: the checkpoints of the run with the highest score" if best else ""
    note(figure, style, line, which_runs(runs))
    return figure


def budget_sweep(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Any:
    """Figure 6: the score over the budget B, a line for increment-S and one for repeat-S, on a linear axis.

    Where repeat-S keeps what it tuned, it changes more weights than B: its label says so, and a note says how many.

    Args:
        records: Runs (`unmask.lab.figures.RunRecord`).
        style: Colours of the page.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No records, one lacks an entry, or runs of one place are not to be averaged.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records)
    looks, names = look_of(list(by_method(runs))), labels(runs)

    def draw(axes: Any, group: list[RunRecord]) -> None:
        ends = []
        for (x, y, method, colour), of_method in zip(
            _lines(axes, group, lambda run: run["budget"], looks), by_method(group).values(), strict=True
        ):
            more = " (tunes more than B)" if any(trained(run) > run["budget"] for run in of_method) else ""
            ends.append((x, y, f"{names[method]}{more}", colour))
        count_axis(axes, [run["budget"] for run in group])
        axes.set_xlabel("budget B, weights")
        _finish(axes, ends, style)

    figure = panels(runs, style, draw)
    note(figure, style, *_tuned_beyond(runs, names), which_runs(runs))
    return figure


def _tuned_beyond(runs: Sequence[RunRecord], names: Mapping[str, str]) -> list[str]:
    """Says of each method that changes more weights than its budget how many."""
    texts = []
    for method, group in by_method(runs).items():
        counts = [trained(run) for run in group if trained(run) > run["budget"]]
        if counts:
            span = " to ".join(dict.fromkeys((short(min(counts)), short(max(counts)))))
            texts.append(f"{names[method]} changes {span} weights in all, more than its budget B")
    return texts


def _lines(axes: Any, runs: Sequence[RunRecord], x: Any, looks: Mapping[str, Look]) -> list[End]:
    """A line per method; returns the lines' ends, with the methods' names."""
    ends = []
    methods = by_method(runs)
    for i, (method, group) in enumerate(methods.items()):
        points = averaged(group, x)
        draw_points(axes, points, looks[method], aside(i, len(methods)))
        ends.append((points[-1].x, points[-1].mean, method, looks[method].colour))
    return ends


def _across(axes: Any, name: str, runs: Sequence[RunRecord]) -> list[End]:
    """A red line across for each budget."""
    ends, right = [], axes.get_xlim()[1]
    budgets = sorted({run["budget"] for run in runs})
    for i, budget in enumerate(budgets):
        group = [run for run in runs if run["budget"] == budget]
        at = point(right, group)
        axes.axhline(at.mean, color=RED, linewidth=1.4, linestyle=LINES[1:][i % 3], zorder=2)
        draw_spread(axes, Point(0.99 * right, at.mean, at.half), RED)
        whole = f", B = {short(budget)}" if len(budgets) > 1 else ""
        tuned = short(fmean(trained(run) for run in counting(group)))
        ends.append((right, at.mean, f"{name}{whole}, {tuned} tuned", RED))
    return ends


def _finish(axes: Any, ends: Sequence[End], style: Style) -> None:
    """Room above and below, then the labels, which stand by the limits."""
    axes.margins(y=0.08)
    axes.autoscale_view(scalex=False)
    axes.set_ylim(axes.get_ylim())
    label_ends(axes, ends, style)


def _curves(axes: Any, name: str, runs: Sequence[RunRecord], look: Look) -> list[End]:
    """One line per budget: the mean over seeds with each seed's own behind it, or the best run's."""
    colour, ends = look.colour, []
    budgets = sorted({run["budget"] for run in runs})
    for budget in budgets:
        kept = counting([run for run in runs if run["budget"] == budget])
        if "best" in kept[0]:
            kept = kept[:1]
        curves = [[at for at in run["curve"] if at["used"]] for run in kept]
        for curve in curves if len(curves) > 1 else []:
            axes.plot(*_xy(curve), color=colour, linewidth=0.8, alpha=0.45, zorder=2)
        mean = _mean_curve(curves)
        marks = {"marker": look.marker, "markersize": 3.5, "markevery": math.ceil(len(mean) / 12)}
        axes.plot(*zip(*mean, strict=True), "-", color=colour, linewidth=1.6, zorder=3, **marks)
        whole = f", B = {short(budget)}" if len(budgets) > 1 else ""
        ends.append((*mean[-1], f"{name}{whole}", colour))
    return ends


def _xy(curve: Sequence[CurvePoint]) -> tuple[list[int], list[float]]:
    return [at["used"] for at in curve], [at["score"] for at in curve]


def _mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[tuple[float, float]]:
    """Mean score where every seed has a point."""
    shared = set.intersection(*({at["used"] for at in curve} for curve in curves))
    if not shared:
        raise DataError(
            "the seeds of one run have no point of their curves in common; evaluate them at the same steps."
        )
    scores = {used: [at["score"] for curve in curves for at in curve if at["used"] == used] for used in shared}
    return [(float(used), fmean(scores[used])) for used in sorted(shared)]
