"""The parts that several figures share: panels per task, means of runs, lines with intervals, legends, notes below."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from statistics import fmean
from typing import Any

from unmask.errors import DataError, need
from unmask.lab.figures.estimates import best_of, interval
from unmask.lab.figures.records import RunRecord, grouped
from unmask.lab.figures.style import Figure, Look, Style, dress, new_figure

_WIDTH, _HEIGHT = 4.6, 3.3
"""The size of a panel in inches."""
_METRICS = {
    "matthews": "Matthews correlation", "f1": "F1", "mse": "mean squared error", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation", "pearson_spearman": "mean of Pearson and Spearman",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """The mean score at one place of the x axis.

    Attributes:
        x: The place.
        mean: The mean score of the runs that count.
        half: Half the length of the vertical line: half the 95% interval of the mean over seeds, or the standard
            deviation of the best runs; None for one run.
    """

    x: float
    mean: float
    half: float | None


def counting(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the runs of one place that count: all, or those with the ``best`` highest scores if there is that entry.

    Raises:
        DataError: The runs cannot be averaged: they disagree on ``best``, two have the same seed (with ``best``: the
            same seed and rate), or they differ in the learning rate without ``best``.
    """
    best, rates = {run.get("best") for run in runs}, sorted({run["lr"] for run in runs})
    keys = {(run["seed"], run["lr"]) for run in runs} if None not in best else {run["seed"] for run in runs}
    what = ""
    if len(best) > 1:
        what = "different entries 'best'"
    elif len(rates) > 1 and None in best:
        what = f"learning rates {rates}"
    elif len(keys) < len(runs):
        what = "two runs of one seed" + ("" if None in best else " and learning rate")
    if what:
        names = ", ".join(run["name"] for run in runs)
        raise DataError(
            f"runs {names} would be averaged as runs of one setting, but have {what}; give the chosen ones, and variants "
            "under method names of their own."
        )
    return sorted(runs, key=itemgetter("score"), reverse=True)[: best.pop()] if None not in best else list(runs)


def point(x: float, runs: Sequence[RunRecord]) -> Point:
    """Returns the mean of the runs that count at one place, with an interval or the deviation of the best runs."""
    scores = [run["score"] for run in counting(runs)]
    if runs[0].get("best") is not None:
        found = best_of(scores, len(scores))
        return Point(x, found.mean, found.deviation)
    found = interval(scores)
    return Point(x, found.mean, None if found.high is None else found.high - found.mean)


def averaged(runs: Sequence[RunRecord], x: Callable[[RunRecord], float]) -> list[Point]:
    """Returns the points of all x, by rising x; raises what `counting` raises."""
    return [point(place, [run for run in runs if x(run) == place]) for place in sorted(set(map(x, runs)))]


def by_budget(runs: Iterable[RunRecord], name: str) -> list[tuple[str, list[RunRecord]]]:
    """Returns a label and the runs of each budget, by rising budget; the label names the budget if there are several."""
    budgets = sorted(grouped(runs, "budget").items())
    return [(name + (f", B = {short(budget)}" if len(budgets) > 1 else ""), group) for budget, group in budgets]


def panels(records: Sequence[RunRecord], style: Style, draw: Callable[[Any, list[RunRecord]], None]) -> Figure:
    """Returns a figure with a panel for each model and task; ``draw(axes, records)`` fills a panel."""
    groups = grouped(records, "model", "task")
    columns = min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = new_figure(_WIDTH * columns + 0.3, _HEIGHT * rows + 0.2, style)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for (model, task), axes in zip(groups, grid, strict=False):
        axes.set_title(f"{task} · {model}", loc="left", fontsize=9, color=style.ink)
        axes.set_ylabel(metric_name(groups[model, task][0]))
        draw(axes, groups[model, task])
        dress(axes, style, grid="y")
    for axes in list(grid)[len(groups) :]:
        axes.remove()
    return figure


def metric_name(run: RunRecord) -> str:
    """Returns the name of a run's main metric for an axis.

    Example:
        >>> metric_name({"metric": "matthews"}), metric_name({"metric": "accuracy"}), metric_name({})
        ('Matthews correlation', 'accuracy', 'score')
    """
    return _METRICS.get(run.get("metric", ""), run.get("metric", "score"))


def draw_points(axes: Any, points: Sequence[Point], look: Look, label: str = "", aside: float = 0) -> None:
    """Draws a line through means, with intervals where there are several runs.

    The points move ``aside`` to the right, in printer's points, so that intervals of several lines stay apart.
    """
    shift = need("matplotlib.transforms", "plot").ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    place = axes.transData + shift
    xs, means = [p.x for p in points], [p.mean for p in points]
    style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "transform": place}
    axes.plot(xs, means, markersize=4.5, linewidth=1.4, zorder=3, label=label, **style)
    for p in points:
        draw_spread(axes, p, look.colour, place)
    axes.update_datalim([(p.x, p.mean + sign * (p.half or 0)) for p in points for sign in (-1, 1)])


def draw_spread(axes: Any, at: Point, colour: str, transform: Any = None) -> None:
    """Draws the vertical line of a point, if several runs count at it."""
    if at.half is not None:
        ends, place = [at.mean - at.half, at.mean + at.half], transform or axes.transData
        axes.plot([at.x, at.x], ends, "-", color=colour, linewidth=1, alpha=0.6, zorder=2, transform=place)


def draw_course(
    axes: Any, courses: Sequence[Sequence[tuple[float, float]]], look: Look, dashes: Any, label: str
) -> None:
    """Draws the mean of the runs' courses, which are (x, y) points, at every x that all of them have.

    Raises:
        DataError: There is no such x.
    """
    xs = sorted(set.intersection(*({x for x, _ in course} for course in courses)))
    if not xs:
        raise DataError(
            "the seeds of one run have no point of their curves in common; evaluate them at the same steps."
        )
    means = [fmean(y for course in courses for at, y in course if at == x) for x in xs]
    line = {"color": look.colour, "linestyle": dashes, "linewidth": 1.6, "zorder": 3, "clip_on": False}
    axes.plot(xs, means, label=label, marker=look.marker, markersize=3.5, markevery=math.ceil(len(xs) / 12), **line)


def which_runs(runs: Iterable[RunRecord], spread: bool = True) -> str:
    """Describes what is averaged where a setting has several runs; with ``spread`` also what the vertical lines mean.

    Example:
        >>> which_runs([{"seed": 6, "best": 3}, {"seed": 7, "best": 3}], spread=False)
        'means of the best 3 runs of each setting; runs differ in seed and learning rate'
    """
    runs = list(runs)
    texts = []
    places = {tuple(run.get(key) for key in ("model", "method", "task", "budget")) for run in runs}
    several = len(places) < len(runs)
    for best in sorted({run["best"] for run in runs if several and run.get("best") is not None}):
        which = "the best run of each setting" if best == 1 else f"means of the best {best} runs of each setting"
        lines = "; vertical lines: plus and minus their standard deviation (n - 1)" if spread and best > 1 else ""
        texts.append(f"{which}; runs differ in seed and learning rate{lines}")
    if len({run["seed"] for run in runs if run.get("best") is None}) > 1:
        lines = "; vertical lines: 95% interval of the mean over seeds (Student's t)" if spread else ""
        texts.append(f"means over seeds{lines}")
    return "\n".join(texts)


def note(figure: Figure, style: Style, *texts: str) -> None:
    """Writes texts below the panels. Each begins on a new line and is broken at the figure's width."""
    width = int(figure.get_size_inches()[0] * 19)  # The letters have 7 points.
    lines = [line for text in texts for part in text.split("\n") for line in textwrap.wrap(part, width)]
    if lines:
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7, color=style.muted)


def legend_outside(axes: Any, style: Style) -> None:
    """Draws the legend of the labelled lines at the right of the axes; without labelled lines it draws none."""
    if axes.get_legend_handles_labels()[0]:
        place = {"loc": "upper left", "bbox_to_anchor": (1.03, 1), "borderaxespad": 0}
        axes.legend(frameon=False, fontsize=8, handlelength=3.5, labelcolor=style.ink, **place)


def count_axis(axes: Any, at: Iterable[float] = ()) -> None:
    """Makes a linear x axis of weight counts in few letters, with ticks at the given counts where there is room."""
    ticker = need("matplotlib.ticker", "plot")
    values = sorted(set(at))
    kept = values[-1:]
    for value in values[:-1]:  # The two ends come first, then what has room between them.
        if all(abs(value - other) > 0.1 * (values[-1] - values[0]) for other in kept):
            kept.append(value)
    kept.sort()
    axes.xaxis.set_major_locator(ticker.FixedLocator(kept) if kept else ticker.MaxNLocator(5))
    # Labels that would touch stand a line lower.
    near = {b for a, b in pairwise(kept) if b - a < 0.16 * (values[-1] - values[0])}
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda count, place: "\n" * (count in near) + short(count)))


def short(count: float) -> str:
    """Returns a count in few letters.

    Example:
        >>> short(320_000), short(22_713_986), short(950), short(999_999)
        ('320K', '22.7M', '950', '1M')
    """
    count = float(f"{count:.3g}")
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"
