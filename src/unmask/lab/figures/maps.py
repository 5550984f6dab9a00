"""Draws the places of a budget: heat maps of module kinds by layers, and the figure of one delta."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from unmask.errors import DataError, need
from unmask.lab.figures.charts import count_axis, counting, note, short, which_runs
from unmask.lab.figures.records import AllocationRow, RunRecord, Snapshot, check_records, grouped, labels
from unmask.lab.figures.style import LIGHT, SERIES, Figure, Style, dress, new_figure
from unmask.methods.naming import KINDS, OTHER

_KINDS = ("Key", "Query", "Value", "Attn Out", "FFN1", "FFN2", "other")
_CELL = 0.34, 0.25
"""The width and height of a cell in inches."""
_RANKS = {"increment": 0, "repeat": 1}
"""The order of a figure's rows; other strategies follow."""
_BARS = 24
"""The most tensors whose densities the figure of a delta shows."""


def allocation_maps(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Figure:
    """Draws Figure 7: the share of the budget in each module kind of each layer, at the start and the end of a run.

    Each method has a row of two panels, its first and its last snapshot, so increment-S and repeat-S make the paper's
    four panels; further tasks, models and budgets follow below. The rows of a panel are module kinds, the columns are
    layers, counted from 1. A cell shows unmasked weights divided by the budget B. For repeat-S these are the weights
    that the step picked, at most B, even if it keeps more. The panel's title gives the share outside the cells
    (embeddings, normalisations, heads). Several runs of one setting are averaged.

    Args:
        records: The runs, with ``allocation``.
        style: The colours of the page.

    Raises:
        DataError: There are no records, one has no snapshot with an unmasked weight or no layers, or runs cannot be
            averaged.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records, "allocation")
    names = labels(runs)
    runs.sort(key=lambda run: _RANKS.get(run.get("strategy", ""), len(_RANKS)))
    layers = max(len(layers_of(shot["rows"], outside=False)) for run in runs for shot in run["allocation"])
    rows = len(grouped(runs, "model", "task", "budget", "method"))
    figure = new_figure(2 * (_CELL[0] * max(layers, 6) + 1.4), (_CELL[1] * len(KINDS) + 1.1) * rows + 0.3, style)
    grid = iter(figure.subplots(rows, 2, squeeze=False).flat)
    for (model, task, budget), block in grouped(runs, "model", "task", "budget").items():
        letters = iter("abcdefghijklmnopqrstuvwxyz" * rows)
        for method, group in grouped(block, "method").items():
            kept = [_ordered(run) for run in counting(group)]
            for moment, at in (("start", 0), ("end", -1)):
                title = f"({next(letters)}) {names[method]}, {moment} · {task} · {model}"
                _panel(next(grid), title, [shots[at] for shots in kept], budget, style)
    text = "a cell is its share of the budget B; elsewhere: embeddings, normalisations, heads and what has no such name"
    note(figure, style, text, which_runs(runs, spread=False))
    return figure


def _ordered(run: RunRecord) -> list[Snapshot]:
    """Returns a run's snapshots that have unmasked weights, in the order of the run."""
    shots = [shot for shot in run["allocation"] if shot["used"]]
    if not shots:
        raise DataError(
            f"run {run['name']!r} has no snapshot with an unmasked weight; give a run with one from after a step."
        )
    return sorted(shots, key=lambda shot: (shot.get("step", 0), shot["used"]))


def _panel(axes: Any, title: str, shots: Sequence[Snapshot], budget: int, style: Style) -> None:
    """Draws the mean of some runs' shares of the budget as a heat map with a colour bar.

    The title says how many weights are shown, how many a repeat-S that keeps them has ever tuned, and the share of the
    budget outside the cells.
    """
    rows = [row for shot in shots for row in shot.get("picked", shot["rows"])]
    image = heat_map(axes, rows, len(shots) * budget, style, _few)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.015, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.set_facecolor("none")
    bar.locator = need("matplotlib.ticker", "plot").MaxNLocator(4)
    bar.ax.tick_params(labelsize=7, labelcolor=style.ink, color=style.muted, width=0.8, length=2)
    bar.ax.yaxis.offsetText.set(color=style.ink, fontsize=7)
    steps = {shot["step"] for shot in shots if "step" in shot}
    step = f"step {steps.pop():,}: " if len(steps) == 1 else ""
    shown, used = sum(row["unmasked"] for row in rows) / len(shots), fmean(shot["used"] for shot in shots)
    more = f", {short(used)} ever tuned" if used > shown else ""
    elsewhere = sum(row["unmasked"] for row in rows if OTHER in (row["layer"], row["kind"])) / (len(shots) * budget)
    counts = f"{step}{short(shown)} of B = {short(budget)}{more}\nelsewhere {_few(elsewhere)}"
    axes.set_title(f"{title}\n{counts}", loc="left", fontsize=8.5, color=style.ink)


def delta_figure(facts: Mapping[str, Any], style: Style = LIGHT) -> Figure:
    """Draws what ``unmask inspect --json`` prints: the allocation, tensor densities, and their course over the slots.

    Args:
        facts: ``allocation`` (rows), ``tensors`` (name -> changed, of, density), ``weights``, and ``along``: snapshots
            of rising budgets, which is empty if the delta does not hold the order of unmasking.
        style: The colours of the page.

    Raises:
        DataError: The delta has no weight stored in part.
        MissingExtraError: matplotlib is not installed.
    """
    along: Sequence[Snapshot] = facts["along"]
    maps: list[tuple[str, Sequence[AllocationRow]]] = [(f"all {short(facts['weights'])} weights", facts["allocation"])]
    if len(along) > 1:
        maps.insert(0, (f"the first {short(along[0]['used'])} weights", along[0]["rows"]))
    width = max(9.2 if len(along) > 1 else 6.2, 0.36 * len(layers_of(facts["allocation"])) + 1.2)
    heights = [2.5 * len(maps), 0.2 * min(_BARS, len(facts["tensors"])) + 1.1]
    figure = new_figure(width, sum(heights), style)
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    for part in (top, bottom):
        part.set_facecolor("none")
    for axes, (title, rows) in zip(top.subplots(len(maps), 1, squeeze=False).flat, maps, strict=True):
        whole = sum(row["unmasked"] for row in rows)
        if not whole:
            raise DataError("an allocation without any unmasked weight cannot be drawn; give one from after a step.")
        heat_map(axes, rows, whole / 100, style, _percent, outside=True)
        axes.set_title(f"allocation of {title}, %", loc="left", fontsize=9, color=style.ink)
    below = bottom.subplots(1, 2, width_ratios=[1, 1.1], squeeze=False)[0] if len(along) > 1 else [bottom.subplots()]
    _densest(below[0], facts["tensors"], style)
    if len(along) > 1:
        _along(below[1], along, style)
    return figure


def _densest(axes: Any, tensors: Mapping[str, Mapping[str, float]], style: Style) -> None:
    ordered = sorted(tensors.items(), key=lambda item: -item[1]["density"])
    shown = ordered[:_BARS]
    names = [name if len(name) <= 44 else f"...{name[-41:]}" for name, _ in shown]
    bars = axes.barh(names, [100 * row["density"] for _, row in shown], color=SERIES[1], height=0.7)
    axes.bar_label(bars, [f"{100 * row['density']:.2g}%" for _, row in shown], fontsize=7, padding=2, color=style.ink)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.02)
    rest = f", {len(shown)} of {len(ordered)} tensors" if len(ordered) > len(shown) else ""
    axes.set_title(f"density of the densest{rest}", loc="left", fontsize=9, color=style.ink)
    axes.set_xlabel("unmasked, % of the tensor's weights")
    dress(axes, style, grid="x")
    axes.tick_params(axis="y", labelsize=7, length=0)


def _along(axes: Any, along: Sequence[Snapshot], style: Style) -> None:
    used = [shot["used"] for shot in along]
    axes.plot(used, [100 * shot["tensor_sparsity"] for shot in along], color=SERIES[0], marker="o", markersize=3.5)
    count_axis(axes)
    axes.set_xlabel("unmasked weights, in the order of unmasking")
    axes.set_ylabel("tensor sparsity, %")
    axes.set_ylim(bottom=0)
    axes.set_title("tensor sparsity and sparsity entropy", loc="left", fontsize=9, color=style.ink)
    dress(axes, style, grid="y")
    axes.yaxis.label.set_color(SERIES[0])
    other = axes.twinx()
    other.plot(used, [shot["sparsity_entropy"] for shot in along], color=SERIES[1], marker="s", markersize=3.5)
    other.set_ylabel("sparsity entropy, nats")
    dress(other, style, grid="")
    other.spines["right"].set(visible=True, color=style.muted)
    other.spines["left"].set_visible(False)
    other.yaxis.label.set_color(SERIES[1])


def heat_map(
    axes: Any,
    rows: Sequence[AllocationRow],
    of: float,
    style: Style,
    text: Callable[[float], str],
    outside: bool = False,
) -> Any:
    """Draws one allocation, module kinds from top to bottom and layers from left to right; returns the image.

    Each count is divided by ``of`` and written by ``text``. The colour is strongest at the largest cell within the
    layers, so that an embedding matrix does not outshine them. With ``outside`` there is a row for other modules and a
    column for tensors outside the layers, if there are any.

    Raises:
        DataError: There is no layer to draw, or with ``outside`` no row.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        counts[row["layer"], row["kind"]] += row["unmasked"]
    layers = layers_of(rows, outside)
    if not layers:
        raise DataError("none of the tensors lies in a layer, so there is no map of layers; see unmask.methods.naming.")
    kinds = [*KINDS, *([OTHER] if outside and any(kind == OTHER for _, kind in counts) else [])]
    table = [[counts[layer, kind] / of if (layer, kind) in counts else math.nan for layer in layers] for kind in kinds]
    inside = [count for cell, count in counts.items() if OTHER not in cell]
    top = (max(inside, default=0) or max(counts.values()) or of) / of
    colors = need("matplotlib.colors", "plot")
    fill = colors.LinearSegmentedColormap.from_list("fill", [colors.to_rgba(style.fill, a) for a in (0, 1)])
    image = axes.imshow(table, cmap=fill, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            if not math.isnan(value):
                ink = style.on_fill if value / top > 0.75 else style.ink
                axes.text(x, y, text(value), ha="center", va="center", fontsize=6, color=ink)
    axes.set_xticks(range(len(layers)), [_heading(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), _KINDS[: len(kinds)])
    dress(axes, style, grid="")
    axes.tick_params(length=0, labelsize=7)
    if any(" " in layer for layer in layers):
        axes.tick_params(axis="x", labelrotation=90)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, len(layers))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(kinds))], minor=True)
    axes.grid(True, which="minor", color=style.grid, linewidth=0.5)
    return image


def layers_of(rows: Iterable[AllocationRow], outside: bool = True) -> list[str]:
    """Returns the layers' labels in order, and with ``outside`` at the end the label for tensors outside the layers."""
    labels = dict.fromkeys(row["layer"] for row in rows)
    inside = sorted((label for label in labels if label != OTHER), key=_number)
    return inside + ([OTHER] if outside and OTHER in labels else [])


def _number(label: str) -> tuple[str, int]:
    stack, _, number = label.rpartition(" ")
    return stack, int(number) if number.isdigit() else 0


def _heading(label: str) -> str:
    """Returns a layer's heading, counted from 1: ``"L=1"``, ``"encoder 1"``."""
    if label == OTHER:
        return "outside"
    stack, number = _number(label)
    return f"{stack} {number + 1}" if stack else f"L={number + 1}"


def _few(value: float) -> str:
    """Returns a share in few digits.

    Example:
        >>> [_few(value) for value in (0.0, 0.00092, 0.0021, 0.05, 0.204)]
        ['0', '9e-4', '0.002', '0.05', '0.204']
    """
    if value >= 0.00095:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def _percent(value: float) -> str:
    """Returns a percentage in few digits.

    Example:
        >>> [_percent(value) for value in (0.0, 0.01, 4.26, 41.2)]
        ['0', '<0.1', '4.3', '41']
    """
    if value == 0:
        return "0"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.05 else "<0.1"
