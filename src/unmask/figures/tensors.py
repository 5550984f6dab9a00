"""Figures of how the budget spreads over tensors in the course of a run: tensor sparsity and sparsity entropy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from unmask.figures.charts import label_ends, panels
from unmask.figures.records import RunRecord, by_method, check_records
from unmask.figures.style import LIGHT, Style, look_of


def tensor_sparsity(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Any:
    """Figure 8: the share of tensors that hold no unmasked weight, in the course of the run; a line per method.

    Args:
        records: Runs with ``allocation``. Steps are on the x axis if every snapshot has one, else the unmasked weights.
        style: Colours of the page.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No records, or one has no snapshots.
        MissingExtraError: matplotlib is not installed.
    """
    return _course(records, "tensor_sparsity", "tensor sparsity, %", 100, style)


def sparsity_entropy(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Any:
    """Figure 9: the entropy of the allocation over tensors, in nats; arguments and errors as `tensor_sparsity`."""
    return _course(records, "sparsity_entropy", "sparsity entropy, nats", 1, style)


def _course(records: Iterable[Mapping[str, Any]], key: str, label: str, scale: float, style: Style) -> Any:
    runs = check_records(records, "allocation")
    looks = look_of(list(by_method(runs)))
    x = "step" if all("step" in shot for run in runs for shot in run["allocation"]) else "used"

    def draw(axes: Any, group: list[RunRecord]) -> None:
        ends = []
        for method, of_method in by_method(group).items():
            look = looks[method]
            points = course(of_method, x, key, scale)
            axes.plot(
                *zip(*points, strict=True),
                color=look.colour,
                marker=look.marker,
                linestyle=look.line,
                markersize=3.5,
                linewidth=1.5,
            )
            ends.append((*points[-1], method, look.colour))
        axes.set_xlabel("step" if x == "step" else "unmasked weights")
        axes.set_ylabel(label)
        axes.set_ylim(0 if key == "tensor_sparsity" else None, axes.get_ylim()[1])
        label_ends(axes, ends, style)

    return panels(runs, style, draw)


def course(runs: Sequence[RunRecord], x: str, key: str, scale: float = 1) -> list[tuple[float, float]]:
    """The mean over runs of one of the snapshots' numbers, at every x that all of them have."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for shot in run["allocation"]:
            found.setdefault(float(shot[x]), []).append(scale * float(shot[key]))  # type: ignore[literal-required]
    most = max(len(values) for values in found.values())
    return [(place, fmean(values)) for place, values in sorted(found.items()) if len(values) == most]
