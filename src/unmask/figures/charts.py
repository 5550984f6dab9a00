"""What several figures share: panels per task, averages over seeds, lines with intervals, labels at their ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from unmask.errors import DataError, need
from unmask.figures.intervals import mean_interval
from unmask.figures.records import RunRecord
from unmask.figures.style import Look, Style, dress, new_figure

End = tuple[float, float, str, str]  # a line's end: x, y, label, colour

_WIDTH, _HEIGHT = 4.6, 3.3  # of a panel, inches


@dataclass(frozen=True)
class Point:
    """Runs that differ in the seed alone.

    Attributes:
        x: Where they stand.
        mean: Mean score.
        half: Half the width of the 95% interval of the mean; None for one seed.
        seeds: How many.
    """

    x: float
    mean: float
    half: float | None
    seeds: int


def averaged(records: Iterable[RunRecord], x: Callable[[RunRecord], float]) -> list[Point]:
    """Averages runs at the same x over their seeds, by rising x.

    Raises:
        DataError: Two runs at one x have the same seed, or another learning rate: which one counts is the caller's choice.
    """
    cells: dict[float, list[RunRecord]] = {}
    for record in records:
        cells.setdefault(float(x(record)), []).append(record)
    return [_point(place, cells[place]) for place in sorted(cells)]


def _point(x: float, runs: Sequence[RunRecord]) -> Point:
    rates = sorted({run["lr"] for run in runs})
    if len(rates) > 1 or len({run["seed"] for run in runs}) < len(runs):
        what = f"learning rates {rates}" if len(rates) > 1 else "two runs of one seed"
        names = ", ".join(run["name"] for run in runs)
        raise DataError(
            f"runs {names} would be averaged as seeds of one setting, but have {what}; give the chosen ones, and variants "
            "under method names of their own."
        )
    mean, half = mean_interval([run["score"] for run in runs])
    return Point(x, mean, half, len(runs))


def panels(
    records: Sequence[RunRecord], style: Style, draw: Callable[[Any, list[RunRecord]], None], columns: int = 3
) -> Any:
    """A figure with a panel per model and task; ``draw(axes, records)`` fills each."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record["model"], record["task"]), []).append(record)
    columns = min(columns, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = new_figure(_WIDTH * columns + 0.3, _HEIGHT * rows + 0.2, style)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for (model, task), axes in zip(groups, grid, strict=False):
        axes.set_title(f"{task} · {model}", loc="left", fontsize=9, color=style.ink)
        axes.set_ylabel(groups[model, task][0].get("metric", "score"))
        draw(axes, groups[model, task])
        dress(axes, style, grid="y")
    for axes in list(grid)[len(groups) :]:
        axes.remove()
    return figure


def draw_points(axes: Any, points: Sequence[Point], look: Look, aside: float = 0) -> None:
    """A line through means, with intervals where there are several seeds.

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
        if p.half is not None:
            ends = [p.mean - p.half, p.mean + p.half]
            axes.plot([p.x, p.x], ends, "-", color=look.colour, linewidth=1, alpha=0.6, zorder=2, transform=place)
    axes.update_datalim([(p.x, p.mean + sign * (p.half or 0)) for p in points for sign in (-1, 1)])


def aside(index: int, count: int, width: float = 12) -> float:
    """Where the index-th of so many lines stands beside the true x, in printer's points.

    Example:
        >>> [aside(i, 3) for i in range(3)]
        [-3.0, 0.0, 3.0]
    """
    step = min(3.0, width / max(1, count - 1))
    return step * (index - (count - 1) / 2)


def note_intervals(figure: Any, style: Style, several: bool) -> None:
    """Says under the panels what the vertical lines are, if there are any."""
    if several:
        text = "vertical lines: 95% interval of the mean over seeds (Student's t)"
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color=style.muted)


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


def share_axis(axes: Any, shares: Iterable[float]) -> None:
    """A logarithmic axis of shares, labelled in percent at those that occur."""
    _ticks(axes, sorted(set(shares)), lambda share: f"{100 * share:.2g}%")
    axes.set_xlabel("trained weights, share of all")


def count_axis(axes: Any, counts: Iterable[float]) -> None:
    """A logarithmic axis of counts, labelled at those that occur."""
    _ticks(axes, sorted(set(counts)), short)
    axes.set_xlabel("unmasked weights")


def short(count: float) -> str:
    """A count in few letters.

    Example:
        >>> short(320_000), short(22_713_986), short(950)
        ('320K', '22.7M', '950')
    """
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def _ticks(axes: Any, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Ticks at the values, leaving out those that would touch the one before."""
    if not values or values[0] <= 0:
        raise DataError("a logarithmic axis needs values above 0; give runs with a budget.")
    axes.set_xscale("log")
    span = max(math.log(values[-1] / values[0]), 1e-9)
    kept = [values[-1]]
    for value in values[:-1]:  # the ends, and what has room between them
        if all(abs(math.log(value / other)) > 0.14 * span for other in kept):
            kept.append(value)
    kept.sort()
    axes.set_xticks(kept, [text(value) for value in kept])
    axes.xaxis.set_minor_locator(need("matplotlib.ticker", "plot").NullLocator())
    axes.set_xlim(values[0] * math.exp(-0.06 * max(span, 1)), values[-1] * math.exp(0.06 * max(span, 1)))
