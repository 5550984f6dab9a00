"""Heat maps of where the budget lies: layer by module kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unmask.errors import DataError, need
from unmask.figures.charts import short
from unmask.figures.records import AllocationRow, RunRecord, Snapshot, by_method, check_records
from unmask.figures.style import LIGHT, Style, dress, new_figure
from unmask.naming import KINDS, OTHER

_COLUMNS = (*KINDS, OTHER)
_HEADS = ("key", "query", "value", "attn out", "FFN1", "FFN2", "other")


def allocation_maps(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Any:
    """Figure 7: the allocation at the start and at the end of a run, layer by module kind, a row per method, model and task.

    A cell holds its percentage of the weights that are unmasked at that moment (all cells of a map make 100). Seeds are averaged
    by adding their counts. Column and row ``other`` hold what is in no kind or outside the layers.

    Args:
        records: Runs with ``allocation`` (the first and the last snapshot are drawn).
        style: Colours of the page.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No records, or one has no snapshots.
        MissingExtraError: matplotlib is not installed.
    """
    runs = check_records(records, "allocation")
    groups: dict[tuple[str, str, str], list[RunRecord]] = {}
    for method, of_method in by_method(runs).items():
        for run in of_method:
            groups.setdefault((method, run["task"], run["model"]), []).append(run)
    titled = []
    for (method, task, model), group in groups.items():
        for moment, at in (("start", 0), ("end", -1)):
            shots = [_ordered(run)[at] for run in group]
            used = sum(shot["used"] for shot in shots) / len(shots)
            title = f"{method} · {task} · {model}\n{moment}: {short(used)} weights"
            titled.append((title, [row for shot in shots for row in shot["rows"]]))
    layers = max(len(layers_of(rows)) for _, rows in titled)
    figure = new_figure(8.6, (0.25 * layers + 1.15) * len(groups) + 0.2, style)
    top = max(_shares(rows)[2] for _, rows in titled)
    for axes, (title, rows) in zip(figure.subplots(len(groups), 2, squeeze=False).flat, titled, strict=True):
        heat_map(axes, rows, style, top)
        axes.set_title(title, loc="left", fontsize=8.5, color=style.ink)
    return figure


def heat_map(axes: Any, rows: Sequence[AllocationRow], style: Style, top: float | None = None) -> None:
    """Draws one allocation as percentages of its sum; the colour is full at ``top`` percent and above.

    Args:
        axes: Where.
        rows: The allocation.
        style: Colours of the page.
        top: None for the largest cell of a kind, so that one embedding matrix does not outshine the layers.
    """
    layers, table, largest = _shares(rows)
    top = max(top or largest, 1e-12)
    colors = need("matplotlib.colors", "plot")
    strength = [
        [colors.to_rgba(style.fill, min(1.0, 0 if value is None else value / top)) for value in row] for row in table
    ]
    axes.imshow(strength, aspect="auto", interpolation="nearest")
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value is not None:
                ink = style.on_fill if value / top > 0.75 else style.ink
                axes.text(x, y, _percent(value), ha="center", va="center", fontsize=6.5, color=ink)
    axes.set_xticks(range(len(_COLUMNS)), _HEADS)
    axes.set_yticks(range(len(layers)), ["outside" if layer == OTHER else layer for layer in layers])
    axes.set_ylabel("layer")
    dress(axes, style, grid="")
    axes.tick_params(length=0, labelsize=7.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, len(_COLUMNS))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(layers))], minor=True)
    axes.grid(True, which="minor", color=style.grid, linewidth=0.5)


def layers_of(rows: Iterable[AllocationRow]) -> list[str]:
    """Layer labels in order, what is outside the layers last."""
    labels = dict.fromkeys(row["layer"] for row in rows)
    inside = sorted((label for label in labels if label != OTHER), key=_number)
    return [*inside, *([OTHER] if OTHER in labels else [])]


def _number(label: str) -> tuple[str, int]:
    stack, _, number = label.rpartition(" ")
    return stack, int(number) if number.isdigit() else 0


def _shares(rows: Sequence[AllocationRow]) -> tuple[list[str], list[list[float | None]], float]:
    """Layers, percentages (None where there is no weight), the largest one of a kind."""
    layers, total = layers_of(rows), sum(row["unmasked"] for row in rows)
    if not layers or total <= 0:
        raise DataError("an allocation without any unmasked weight cannot be drawn; give snapshots from after a step.")
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        counts[row["layer"], row["kind"]] = counts.get((row["layer"], row["kind"]), 0) + row["unmasked"]
    table = [
        [100 * counts[layer, kind] / total if (layer, kind) in counts else None for kind in _COLUMNS]
        for layer in layers
    ]
    values = [value for row in table for value in row if value is not None]
    of_kinds = [value for row in table for value in row[:-1] if value]
    return layers, table, max(of_kinds or values)


def _percent(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.05 else "<0.1"


def _ordered(run: RunRecord) -> list[Snapshot]:
    """Its snapshots with any unmasked weight, in order of the run."""
    shots = [shot for shot in run["allocation"] if shot["used"]]
    if not shots:
        raise DataError(f"run {run['name']!r} has no snapshot with an unmasked weight.")
    return sorted(shots, key=lambda shot: (shot.get("step", 0), shot["used"]))
