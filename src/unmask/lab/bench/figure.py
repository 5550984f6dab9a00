"""Draws a record: the step time by phase and the peak memory of each row, or a curve on logarithmic axes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.errors import need

_PHASES = {"forward": "#4477aa", "backward": "#ee9944", "optimizer": "#55aa77"}
_MEMORY = "#8877aa"
_STRIDED = {
    "static": "static",
    "id3-10 between": "ID3 stride 10, between",
    "id3-10 selecting": "ID3 stride 10, selecting",
}
# For each curve the key and the label of the x axis, the label of the y axis, and the lines.
_CURVES: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "budget": ("budget", "budget B (scalar weights)", "step, in units of the frozen backward", _STRIDED),
    "size": ("parameters", "weights N", "step, s", {"frozen": "frozen backward", **_STRIDED}),
}


def save_figure(record: Mapping[str, Any], path: Path) -> None:
    """Draws the record of a run or of a curve into a PNG file in an existing folder, if there is something to draw.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = need("matplotlib.figure", "bench").Figure(layout="constrained", dpi=150)
    if "points" not in record:
        _draw_table(figure, record)
    elif record["points"]:
        _draw_curve(figure, record)
    if figure.axes:
        figure.savefig(path)


def _draw_table(figure: Any, record: Mapping[str, Any]) -> None:
    timed = {label: row["timing"] for label, row in record["rows"].items() if row["timing"]}
    peaks = {label: row["memory"]["peak_mb"] for label, row in record["rows"].items() if "peak_mb" in row["memory"]}
    panels = [panel for panel in (timed, peaks) if panel]
    if not panels:
        return
    figure.set_size_inches(5.5 * len(panels) + 1, 0.38 * max(map(len, panels)) + 1.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    if timed:
        labels, left = list(timed), [0.0] * len(timed)
        for phase, colour in _PHASES.items():
            widths = [figures[phase]["median"] for figures in timed.values()]
            axes[0].barh(labels, widths, left=left, color=colour, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        marked = [(figures["amortised"], label) for label, figures in timed.items() if "amortised" in figures]
        if marked:
            axes[0].plot(*zip(*marked, strict=True), "k|", markersize=12, label="amortised step")
        axes[0].set_xlabel("median of each phase, s per step")
        axes[0].invert_yaxis()
        axes[0].legend(fontsize=8)
        axes[0].set_xlim(0, 1.05 * max([*left, *(value for value, _ in marked)]))
    if peaks:
        bars = axes[-1].barh(list(peaks), list(peaks.values()), color=_MEMORY)
        axes[-1].bar_label(bars, labels=[f"{value:,.0f}" for value in peaks.values()], fontsize=8, padding=2)
        axes[-1].set_xlabel("peak memory, MB")
        axes[-1].invert_yaxis()
        axes[-1].set_xlim(0, 1.15 * max(peaks.values()))
    model, settings = record["model"], record["settings"]
    figure.suptitle(
        f"{model['name']}, {model['batch_size']} x {model['seq_len']} tokens, {settings['dtype']}, "
        f"budget {settings['budget']:,}, {record['machine']['threads']} threads",
        fontsize=10,
    )


def _draw_curve(figure: Any, record: Mapping[str, Any]) -> None:
    points = record["points"]
    figure.set_size_inches(7, 4.5)
    axes = figure.subplots()
    if record["curve"] == "selection":
        labels = [f"{point['model']}\n{point['parameters'] / 1e6:.0f}M" for point in points]
        bars = axes.bar(labels, [100 * point["share of backward"] for point in points], color=_PHASES["backward"])
        axes.bar_label(bars, fmt="%.1f%%", fontsize=8)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("cost of selecting, % of a dense backward pass")
        return
    x, x_label, y_label, lines = _CURVES[record["curve"]]
    for key, label in lines.items():
        known = [(point[x], point[key]) for point in points if point.get(key)]
        if known:
            axes.plot(*zip(*known, strict=True), "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
