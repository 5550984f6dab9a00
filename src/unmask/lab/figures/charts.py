"""What several figures share: panels per task, means of runs, lines with intervals, labels at their ends, notes below."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from unmask.errors import DataError, need
from unmask.lab.figures.intervals import mean_interval
from unmask.lab.figures.records import RunRecord
from unmask.lab.figures.style import Look, Style, dress, new_figure

End = tuple[float, float, str, str]  # a line's end: x, y, label, colour

_WIDTH, _HEIGHT = 4.6, 3.3  # of a panel, inches
_METRICS = {
    "matthews": "Matthews correlation", "f1": "F1", "mse": "mean squared error", "pearson": "Pearson correlation",
    "spearman": "Spearman correlation", "pearson_spearman": "mean of Pearson and Spearman",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """The mean of the runs of one place that count.

    Attributes:
        x: The place.
        mean: Mean score.
        half: What the vertical line extends up and down: half the 95% interval of the mean over seeds, or the standard
            deviation of the best runs; None for one run.
    """

    x: float
    mean: float
    half: float | None


def main_score(run: RunRecord) -> float:
    """A run's main metric."""
    return run["score"]


def counting(runs: Sequence[RunRecord], score: Callable[[RunRecord], float] = main_score) -> list[RunRecord]:
    """The runs of one place that count: all of them, or with the entry ``best`` so many, the highest scores first.

    Raises:
        DataError: Runs of one place that are not to be averaged: they disagree on ``best``, two have the same seed (with
            ``best``: the same seed and rate), or they differ in the learning rate without ``best``.
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
    return sorted(runs, key=score, reverse=True)[: best.pop()] if None not in best else list(runs)


def point(x: float, runs: Sequence[RunRecord], score: Callable[[RunRecord], float] = main_score) -> Point:
    """The mean at one place over the runs that count, with Student's interval, or the deviation of the best ones."""
    kept = counting(runs, score)
    values = [score(run) for run in kept]
    if kept[0].get("best") is None:
        return Point(x, *mean_interval(values))
    return Point(x, fmean(values), stdev(values) if len(values) > 1 else None)


def averaged(records: Iterable[RunRecord], x: Callable[[RunRecord], float]) -> list[Point]:
    """A point for the runs at each x, by rising x; errors as `counting`."""
    cells: dict[float, list[RunRecord]] = {}
    for record in records:
        cells.setdefault(float(x(record)), []).append(record)
    return [point(place, cells[place]) for place in sorted(cells)]


def by_task(records: Iterable[RunRecord]) -> dict[tuple[str, str], list[RunRecord]]:
    """Groups runs by (model, task), in order of the first run of each."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record["model"], record["task"]), []).append(record)
    return groups


def panels(
    records: Sequence[RunRecord], style: Style, draw: Callable[[Any, list[RunRecord]], None], columns: int = 3
) -> Any:
    """A figure with a panel per model and task; ``draw(axes, records)`` fills each."""
    groups = by_task(records)
    columns = min(columns, len(groups))
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
    """The name of a run's main metric, as an axis has it.

    Example:
        >>> metric_name({"metric": "matthews"}), metric_name({"metric": "accuracy"}), metric_name({})
        ('Matthews correlation', 'accuracy', 'score')
    """
    return _METRICS.get(run.get("metric", ""), run.get("metric", "score"))


def draw_points(axes: Any, points: Sequence[Point], look: Look, aside: float = 0) -> None:
    """A line through means, with intervals where there are several runs.

    Args:
        axes: Where.
        points: By rising x.
        look: Colour, marker and line.
        aside: Moves the points to the right by so many printer's points, so that intervals of several lines stay apart.
    """
    shift = need("matplotlib.transforms", "plot").ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    place = axes.transData + shift
    xs, means = [p.x for p in points], [p.mean for p in points]
    style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "transform": place}
    axes.plot(xs, means, markersize=4.5, linewidth=1.4, zorder=3, **style)
    for p in points:
        draw_spread(axes, p, look.colour, place)
    axes.update_datalim([(p.x, p.mean + sign * (p.half or 0)) for p in points for sign in (-1, 1)])


def draw_spread(axes: Any, at: Point, colour: str, transform: Any = None) -> None:
    """The vertical line of a point, if several runs count at it."""
    if at.half is not None:
        ends = [at.mean - at.half, at.mean + at.half]
        place = {} if transform is None else {"transform": transform}
        axes.plot([at.x, at.x], ends, "-", color=colour, linewidth=1, alpha=0.6, zorder=2, **place)


def aside(index: int, count: int, width: float = 12) -> float:
    """How far the index-th of so many lines stands to the right of the true x, in printer's points.

    Example:
        >>> [aside(i, 3) for i in range(3)]
        [-3.0, 0.0, 3.0]
    """
    step = min(3.0, width / max(1, count - 1))
    return step * (index - (count - 1) / 2)


def which_runs(runs: Iterable[RunRecord], spread: bool = True) -> str:
    """Says what is averaged where there are several runs of one setting; with ``spread`` what the vertical lines are too.

    Example:
        >>> which_runs([{"seed": 6, "best": 3}, {"seed": 7, "best": 3}], spread=False)
        'means of the best 3 runs of each setting; runs differ in seed and learning rate'
    """
    runs = list(runs)
    texts = []
    places = Counter(tuple(run.get(key) for key in ("model", "method", "task", "budget")) for run in runs)
    several = max(places.values(), default=0) > 1
    for best in sorted({run["best"] for run in runs if several and run.get("best") is not None}):
        which = "the best run of each setting" if best == 1 else f"means of the best {best} runs of each setting"
        lines = "; vertical lines: plus and minus their standard deviation (n - 1)" if spread and best > 1 else ""
        texts.append(f"{which}; runs differ in seed and learning rate{lines}")
    if len({run["seed"] for run in runs if run.get("best") is None}) > 1:
        lines = "; vertical lines: 95% interval of the mean over seeds (Student's t)" if spread else ""
        texts.append(f"means over seeds{lines}")
    return "\n".join(texts)


def note(figure: Any, style: Style, *texts: str) -> None:
    """Writes sentences below the panels, each from a line of its own, broken at the figure's width."""
    width = int(figure.get_size_inches()[0] * 19)  # letters of 7 points
    lines = [line for text in texts for part in text.split("\n") for line in textwrap.wrap(part, width)]
    if lines:
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7, color=style.muted)


def label_ends(axes: Any, ends: Sequence[End], style: Style) -> None:
    """Writes a label at the right of the axes for every line end, moved apart where they would touch.

    The text has the page's ink, for many labels are small; the line to its end has the series' colour.

    Args:
        axes: With its limits set.
        ends: (x, y, label, colour) each.
        style: Colours of the page.
    """
    if not ends:
        return
    low, high = axes.get_ylim()
    height = axes.figure.get_size_inches()[1] * 72 / axes.get_subplotspec().get_gridspec().nrows * 0.72  # points
    wanted = sorted(((y - low) / (high - low), x, y, text, colour) for x, y, text, colour in ends)
    places = spread([place for place, *_ in wanted], gap=10.5 / height)
    out = max(0.0, places[-1] - 1) - max(0.0, -places[0])  # back between the ends of the axis, as far as there is room
    places = [place - out for place in places]
    for (_, x, y, text, colour), place in zip(wanted, places, strict=True):
        axes.annotate(
            text,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=style.ink,
            fontsize=8,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.6,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves ascending places apart to at least ``gap``, as a whole as little as they can.

    Example:
        >>> [round(place, 2) for place in spread([0.5, 0.5, 0.9], gap=0.1)]
        [0.45, 0.55, 0.9]
    """
    groups: list[list[float]] = []  # [sum of wanted starts, count]; a group's places stand ``gap`` apart
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and _last(groups[-2], gap) + gap > _first(groups[-1], gap) + 1e-12:
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    return [_first(group, gap) + i * gap for group in groups for i in range(int(group[1]))]


def _first(group: Sequence[float], gap: float) -> float:
    total, count = group
    return total / count - gap * (count - 1) / 2


def _last(group: Sequence[float], gap: float) -> float:
    return _first(group, gap) + gap * (group[1] - 1)


def count_axis(axes: Any, at: Iterable[float] = ()) -> None:
    """A linear axis of counts of weights in few letters, with ticks at the given counts as far as they have room."""
    ticker = need("matplotlib.ticker", "plot")
    values = sorted(set(at))
    kept = values[-1:]
    for value in values[:-1]:  # the ends, and what has room between them
        if all(abs(value - other) > 0.1 * (values[-1] - values[0]) for other in kept):
            kept.append(value)
    kept.sort()
    axes.xaxis.set_major_locator(ticker.FixedLocator(kept) if kept else ticker.MaxNLocator(5))
    near = {b for a, b in pairwise(kept) if b - a < 0.16 * (values[-1] - values[0])}  # a line lower, so as not to touch
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda count, place: "\n" * (count in near) + short(count)))


def short(count: float) -> str:
    """A count in few letters.

    Example:
        >>> short(320_000), short(22_713_986), short(950), short(999_999)
        ('320K', '22.7M', '950', '1M')
    """
    count = float(f"{count:.3g}")
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"
