"""Draws Figure 1: the average score over all columns of all tasks, against the share of trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from statistics import fmean
from typing import Any

from unmask.errors import DataError, need
from unmask.lab.figures.charts import Point, draw_spread, metric_name, note, point, short, which_runs
from unmask.lab.figures.records import RunRecord, check_records, grouped, trained
from unmask.lab.figures.style import LIGHT, LINES, Figure, Look, Style, dress, look_of, new_figure

_GLUE = {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"}
_GLUE_COLUMNS = 9
"""The number of GLUE's columns; MNLI has two."""
_WHOLE = 0.5
"""A method that trains a larger share of the model is a line across, not a marker."""
_SAME = 1.01
"""Budgets with a smaller ratio count as one, because a share of the model depends a little on its head."""
_AREAS = (16, 170)
"""The area in square points of the smallest marker, and of the marker of the largest count."""

Column = tuple[str, str]
"""A task, and the label of one of its columns."""


@dataclass(frozen=True)
class Place:
    """The average score of one method at one budget.

    Attributes:
        method: The method's name.
        trained: The number of weights that the method trains, as the mean over its runs.
        at: The average score in percent, at the share of the model in percent.
        lacking: The labels of the columns that other methods have and this one lacks. If there are any, the place is
            not drawn.
    """

    method: str
    trained: float
    at: Point
    lacking: tuple[str, ...]


def score_against_share(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Figure:
    """Draws Figure 1: the average over all columns of all tasks against the share of trained weights, a panel a model.

    Both axes are linear and in percent. A marker is a method at a budget; its size stands for the number of trained
    weights. A method that trains more than half of the model (full fine-tuning) is a line across. A method is drawn at
    the budgets where it has every column that any method has; a note names what is left out. With one column the
    markers have vertical lines; the average of several columns has none, because different runs may count in each
    column.

    Args:
        records: The runs (`unmask.lab.figures.RunRecord`): of each method those of the chosen learning rate, or with
            ``best`` all. Runs without any column do not count.
        style: The colours of the page.

    Raises:
        DataError: There are no records, one lacks an entry, runs of one place cannot be averaged, or no method has all
            columns.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(record for record in records if record.get("columns") != {})
    looks, models = look_of(list(grouped(runs, "method"))), grouped(runs, "model")
    figure = new_figure(6.4 * len(models) + 0.2, 3.9, style)
    texts = []
    for axes, (model, group) in zip(figure.subplots(1, len(models), squeeze=False).flat, models.items(), strict=True):
        columns = _columns(group)
        places = _places(group, columns)
        drawn, rest = [p for p in places if not p.lacking], [p for p in places if p.lacking]
        left = "; ".join(f"{p.method} at {short(p.trained)} ({', '.join(p.lacking)})" for p in rest)
        if not drawn:
            raise DataError(f"no method has a score in every column of {model}; these are lacking: {left}.")
        _draw(axes, drawn, looks, style)
        tasks, over = grouped(group, "task"), "columns"
        if len(tasks) == 1:
            title, label = f"{group[0]['task']} · {model}", f"{metric_name(group[0])}, %"
        elif tasks.keys() <= _GLUE:
            title, label = model, "GLUE average, %"
            if len(columns) < _GLUE_COLUMNS:
                over = f"of GLUE's {_GLUE_COLUMNS} columns"
        else:
            title, label = model, f"average over {len(tasks)} tasks, %"
        axes.set_ylabel(label)
        axes.set_title(title, loc="left", fontsize=9, color=style.ink)
        dress(axes, style)
        if len(columns) > 1:
            text = f"average of {len(columns)} {over}: {', '.join(name for _, name in columns)}"
            texts.append(f"{model}: {text}" if len(models) > 1 else text)
        if rest:
            texts.append(f"left out of {model}, because columns are lacking: {left}")
    spread = any(len(_columns(group)) == 1 for group in models.values())
    note(figure, style, *texts, which_runs(runs, spread))
    return figure


def _columns(runs: Iterable[RunRecord]) -> list[Column]:
    return list(dict.fromkeys((run["task"], label) for run in runs for label in _scores(run)))


def _scores(run: RunRecord) -> dict[str, float]:
    return run.get("columns", {run["task"]: run["score"]})


def _places(runs: Sequence[RunRecord], columns: Sequence[Column]) -> list[Place]:
    """Returns every method at every budget: methods in the order of their first runs, budgets rising."""
    places: list[Place] = []
    for method, group in grouped(runs, "method").items():
        budgets: list[list[RunRecord]] = []
        for run in sorted(group, key=lambda run: run["budget"]):
            if not budgets or run["budget"] > _SAME * budgets[-1][0]["budget"]:
                budgets.append([])
            budgets[-1].append(run)
        for at_budget in budgets:
            share = 100 * fmean(run["share"] for run in at_budget)
            points, lacking = [], []
            for task, label in columns:
                having = [run for run in at_budget if run["task"] == task and label in _scores(run)]
                if having:
                    points.append(point(share, [{**run, "score": 100 * _scores(run)[label]} for run in having]))
                else:
                    lacking.append(label)
            half = points[0].half if len(columns) == 1 else None
            average = Point(share, fmean(p.mean for p in points), half)
            places.append(Place(method, fmean(map(trained, at_budget)), average, tuple(lacking)))
    return places


def _draw(axes: Any, places: Sequence[Place], looks: Mapping[str, Look], style: Style) -> None:
    """Draws the markers, the lines across, and their legends."""
    markers = [place for place in places if place.at.x <= 100 * _WHOLE]
    across = [place for place in places if place.at.x > 100 * _WHOLE]
    largest = max((place.trained for place in markers), default=1)
    for place in markers:
        look = looks[place.method]
        fill = {"facecolor": (look.colour, 0.35), "edgecolor": look.colour, "linewidths": 1.2}
        area = _area(place.trained, largest)
        axes.scatter([place.at.x], [place.at.mean], s=area, marker=look.marker, zorder=3, label=place.method, **fill)
        draw_spread(axes, place.at, look.colour)
    for i, place in enumerate(across):
        line = {"color": style.muted, "linewidth": 1.2, "linestyle": LINES[(1 + i) % len(LINES)]}
        axes.axhline(place.at.mean, zorder=1, label=f"{place.method}, {short(place.trained)} weights", **line)
    axes.margins(y=0.08)
    axes.autoscale_view(scalex=False)
    axes.set_xlim(0, 1.12 * max((place.at.x for place in markers), default=100 / 1.12))
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("trained weights, % of the model")
    _legends(axes, {short(place.trained): place.trained for place in markers}, largest, style)


def _legends(axes: Any, counts: Mapping[str, float], largest: float, style: Style) -> None:
    """Draws two legends at the right of the axes: the methods, and the sizes of markers for some of the counts."""
    words = {"frameon": False, "fontsize": 8, "labelcolor": style.ink, "borderaxespad": 0}
    handles, names = axes.get_legend_handles_labels()
    entries = dict(zip(names, handles, strict=True))  # A method has one entry for all its budgets.
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.03, 1), "scatteryoffsets": [0.5]}
    methods = axes.legend(entries.values(), entries, **place, **words)
    for handle in methods.legend_handles:
        if hasattr(handle, "set_sizes"):  # A line across has no size.
            handle.set_sizes([49])
    axes.add_artist(methods)
    methods.set_clip_on(False)  # The layout makes no room for what may be clipped.
    ordered = sorted(counts.items(), key=itemgetter(1))
    shown = ordered if len(ordered) <= 3 else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    if shown:
        marker = {"linestyle": "", "marker": "o", "markerfacecolor": "none", "markeredgecolor": style.ink}
        line = partial(need("matplotlib.lines", "plot").Line2D, [], [], **marker)
        sizes = [line(markersize=_area(count, largest) ** 0.5, label=text) for text, count in shown]
        place = {"loc": "lower left", "bbox_to_anchor": (1.03, 0), "labelspacing": 0.9}
        legend = axes.legend(handles=sizes, title="trained weights", title_fontsize=8, **place, **words)
        legend.get_title().set_color(style.ink)


def _area(count: float, largest: float) -> float:
    """Returns the area of a marker in square points: proportional to the count, but never too small to be seen."""
    least, most = _AREAS
    return max(least, most * count / largest)
