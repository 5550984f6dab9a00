"""Figures of scores: against the share of trained weights, along a run, over budgets, over eps and exp."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from unmask.errors import DataError
from unmask.figures.charts import (
    End,
    aside,
    averaged,
    count_axis,
    draw_points,
    label_ends,
    note_intervals,
    panels,
    share_axis,
    short,
)
from unmask.figures.records import CurvePoint, RunRecord, by_method, check_records
from unmask.figures.style import LIGHT, MARKERS, SERIES, Look, Style, dress, look_of, new_figure

_WHOLE = 0.5  # a method that trains more than this is a line across, not a point


def score_against_share(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Any:
    """Figure 1: score against the share of trained weights, a line per method, a panel per model and task.

    Methods that train more than half of the model (full fine-tuning) are drawn as a line across.

    Args:
        records: Runs (`unmask.figures.RunRecord`), of each method the chosen learning rate's; seeds are averaged.
        style: Colours of the page.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No records, one lacks an entry, or runs of one cell differ in more than the seed.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records)
    looks = look_of(list(by_method(runs)))

    def draw(axes: Any, group: list[RunRecord]) -> None:
        parts = [run for run in group if run["share"] <= _WHOLE]
        ends = _lines(axes, parts, "share", looks)
        if parts:
            share_axis(axes, [run["share"] for run in parts])
        ends += _across(axes, [run for run in group if run["share"] > _WHOLE], style)
        _finish(axes, ends, style)

    return _noted(panels(runs, style, draw), runs, style)


def budget_sweep(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Any:
    """Figure 6: score against the budget, increment-S beside repeat-S; arguments and errors as `score_against_share`."""
    runs = check_records(records)
    looks = look_of(list(by_method(runs)))

    def draw(axes: Any, group: list[RunRecord]) -> None:
        ends = _lines(axes, group, "budget", looks)
        count_axis(axes, [run["budget"] for run in group])
        _finish(axes, ends, style)

    return _noted(panels(runs, style, draw), runs, style)


def score_along_run(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Any:
    """Figure 5: score along one run against the weights unmasked by then, beside finished runs of other strategies.

    Every checkpoint of an increment-S run is a model of a smaller budget: its curve is a line, thin for each seed and thick for
    their mean. The other runs (repeat-S, static) are points at their budgets.

    Args:
        records: Runs; those with ``strategy`` ``"increment"`` need a ``curve``.
        style: Colours of the page.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No increment-S run, or a record lacks an entry.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records, "strategy")
    if not any(run["strategy"] == "increment" for run in runs):
        raise DataError(
            "no run has strategy 'increment', and only such a run's checkpoints are models of smaller budgets."
        )
    check_records([run for run in runs if run["strategy"] == "increment"], "curve")
    looks = look_of(list(by_method(runs)))

    def draw(axes: Any, group: list[RunRecord]) -> None:
        moving = [run for run in group if run["strategy"] == "increment"]
        ends = [end for name, of in by_method(moving).items() for end in _curves(axes, name, of, looks[name])]
        still = [run for run in group if run["strategy"] != "increment"]
        ends += _lines(axes, still, "budget", looks)
        used = [point["used"] for run in moving for point in run["curve"] if point["used"]]
        count_axis(axes, _few([*used, *(run["budget"] for run in still)]))
        _finish(axes, ends, style)

    return _noted(panels(runs, style, draw), runs, style)


def parameter_sweep(
    records: Iterable[Mapping[str, Any]], style: Style = LIGHT, parameters: Sequence[str] = ("eps", "exp")
) -> Any:
    """Figure 4: score over eps and over exp, a row per model and task, a column per parameter.

    Args:
        records: Runs of one method whose ``parameters`` hold the numbers; a line for each value of the other ones.
        style: Colours of the page.
        parameters: What is swept.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No records, or one lacks a parameter.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records, "parameters")
    for run in runs:
        lacking = [name for name in parameters if name not in run["parameters"]]
        if lacking:
            raise DataError(f"run {run['name']!r} lacks parameter {lacking[0]!r}; give the runs of a sweep over it.")
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["task"]), []).append(run)
    figure = new_figure(4.6 * len(parameters) + 0.3, 2.9 * len(groups) + 0.2, style)
    rows = figure.subplots(len(groups), len(parameters), squeeze=False, sharey="row")
    for row, ((model, task), group) in zip(rows, groups.items(), strict=True):
        for axes, parameter in zip(row, parameters, strict=True):
            if axes is row[0]:
                axes.set_title(f"{task} · {model}", loc="left", fontsize=9, color=style.ink)
            others = [name for name in parameters if name != parameter]
            _swept(axes, group, parameter, others, style)
        row[0].set_ylabel(group[0].get("metric", "score"))
    return _noted(figure, runs, style)


def _noted(figure: Any, runs: Sequence[RunRecord], style: Style) -> Any:
    note_intervals(figure, style, several=len({run["seed"] for run in runs}) > 1)
    return figure


def _lines(axes: Any, runs: Sequence[RunRecord], x: str, looks: Mapping[str, Look]) -> list[End]:
    """A line per method; returns the lines' ends, to be labelled."""
    ends = []
    methods = by_method(runs)
    for i, (method, group) in enumerate(methods.items()):
        points = averaged(group, lambda run: run[x])  # type: ignore[literal-required]
        draw_points(axes, points, looks[method], aside(i, len(methods)))
        ends.append((points[-1].x, points[-1].mean, method, looks[method].colour))
    return ends


def _across(axes: Any, runs: Sequence[RunRecord], style: Style) -> list[End]:
    ends = []
    for method, group in by_method(runs).items():
        (point,) = averaged(group, lambda run: 1.0)
        axes.axhline(point.mean, color=style.muted, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        ends.append((axes.get_xlim()[1], point.mean, method, style.ink))
    return ends


def _finish(axes: Any, ends: Sequence[End], style: Style) -> None:
    """Room above and below, then the labels, which stand by the limits."""
    axes.margins(y=0.08)
    axes.autoscale_view(scalex=False)
    axes.set_ylim(axes.get_ylim())
    label_ends(axes, ends, style)


def _curves(axes: Any, method: str, runs: Sequence[RunRecord], look: Look) -> list[End]:
    """One line per budget: the mean over seeds; each seed's own behind it."""
    colour, ends = look.colour, []
    budgets = sorted({run["budget"] for run in runs})
    for budget in budgets:
        curves = [[point for point in run["curve"] if point["used"]] for run in runs if run["budget"] == budget]
        for curve in curves if len(curves) > 1 else []:
            axes.plot(*_xy(curve), color=colour, linewidth=0.8, alpha=0.35, zorder=2)
        mean = _mean_curve(curves)
        axes.plot(
            *zip(*mean, strict=True), "-", color=colour, marker=look.marker, markersize=3.5, linewidth=1.6, zorder=3
        )
        whole = f" to {short(budget)}" if len(budgets) > 1 else ""
        ends.append((*mean[-1], f"{method}, along the run{whole}", colour))
    return ends


def _xy(curve: Sequence[CurvePoint]) -> tuple[list[int], list[float]]:
    return [point["used"] for point in curve], [point["score"] for point in curve]


def _mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[tuple[float, float]]:
    """Mean score where every seed has a point."""
    shared = set.intersection(*({point["used"] for point in curve} for curve in curves))
    if not shared:
        raise DataError(
            "the seeds of one run have no point of their curves in common; evaluate them at the same steps."
        )
    scores = {used: [p["score"] for curve in curves for p in curve if p["used"] == used] for used in shared}
    return [(float(used), fmean(scores[used])) for used in sorted(shared)]


def _few(values: Iterable[float]) -> list[float]:
    """The ends, and up to five in between, for ticks."""
    ordered = sorted(set(values))
    step = max(1, len(ordered) // 6)
    return sorted({*ordered[::step], ordered[0], ordered[-1]})


def _swept(axes: Any, runs: Sequence[RunRecord], parameter: str, others: Sequence[str], style: Style) -> None:
    values = sorted({float(run["parameters"][parameter]) for run in runs})
    fixed = sorted({tuple(float(run["parameters"][other]) for other in others) for run in runs})
    ends = []
    for i, held in enumerate(fixed):
        group = [run for run in runs if tuple(float(run["parameters"][other]) for other in others) == held]
        points = averaged(group, lambda run: run["parameters"][parameter])
        colour = SERIES[i % len(SERIES)]
        draw_points(axes, points, Look(colour, MARKERS[i % len(MARKERS)], "-"), aside(i, len(fixed)))
        label = ", ".join(f"{other} {value:g}" for other, value in zip(others, held, strict=True))
        ends.append((points[-1].x, points[-1].mean, label, colour))
    if values[0] > 0 and values[-1] >= 10 * values[0]:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(parameter)
    _finish(axes, ends, style)
    dress(axes, style, grid="y")
