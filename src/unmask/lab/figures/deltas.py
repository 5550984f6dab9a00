"""Draws the figure of one delta: the places of its weights, and the densities of its tensors over the slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unmask.errors import DataError
from unmask.lab.figures.charts import count_axis, short
from unmask.lab.figures.maps import heat_map, layers_of, percent
from unmask.lab.figures.records import AllocationRow, Snapshot
from unmask.lab.figures.style import LIGHT, SERIES, Figure, Style, dress, new_figure

_BARS = 24


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
        heat_map(axes, rows, whole / 100, style, percent, outside=True)
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
