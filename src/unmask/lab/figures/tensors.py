"""Draws how a run's budget spreads over the tensors: tensor sparsity and sparsity entropy, on axes from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any

from unmask.errors import DataError
from unmask.lab.figures.charts import by_budget, counting, draw_course, legend_outside, note, panels, which_runs
from unmask.lab.figures.records import RunRecord, Snapshot, check_records, grouped, labels
from unmask.lab.figures.style import LIGHT, LINES, Figure, Style, look_of


def tensor_sparsity(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Figure:
    """Draws Figure 8: the share of tensors without an unmasked weight along the run, a line for each method and budget.

    Args:
        records: Runs with ``allocation``. The x axis shows optimizer steps if every snapshot has one, else the unmasked
            weights.
        style: The colours of the page.

    Raises:
        DataError: There are no records, one has no snapshots, or runs of one place cannot be averaged or have no x in
            common.
        MissingExtraError: matplotlib is not installed.
    """
    return _course(records, lambda shot: shot["tensor_sparsity"], "tensor sparsity", style)


def sparsity_entropy(records: Iterable[Mapping[str, Any]], style: Style = LIGHT) -> Figure:
    """Draws Figure 9: the sparsity entropy divided by the logarithm of the number of tensors, along the run.

    The paper takes the entropy of the tensors' densities and shows it between 0.1 and 0.7, but does not say how it is
    scaled. Here it is divided by its largest possible value, ln(tensors). Then 0 means that all unmasked weights lie
    in one tensor, and 1 that every tensor is equally dense.

    Args:
        records: Runs with ``allocation``, as for `tensor_sparsity`.
        style: The colours of the page.

    Raises:
        DataError: The reasons of `tensor_sparsity`, or a snapshot of a single tensor.
        MissingExtraError: matplotlib is not installed.
    """
    return _course(records, _relative_entropy, "sparsity entropy / ln(tensors)", style)


def _relative_entropy(shot: Snapshot) -> float:
    if shot["tensors"] < 2:
        raise DataError(f"a snapshot is taken over {shot['tensors']} tensors; the sparsity entropy needs at least 2.")
    return shot["sparsity_entropy"] / math.log(shot["tensors"])


def _course(
    records: Iterable[Mapping[str, Any]], value: Callable[[Snapshot], float], y_label: str, style: Style
) -> Figure:
    runs = check_records(records, "allocation")
    looks, names = look_of(list(grouped(runs, "method"))), labels(runs)
    x = "step" if all("step" in shot for run in runs for shot in run["allocation"]) else "used"
    place = itemgetter(x)

    def draw(axes: Any, group: list[RunRecord]) -> None:
        for method, of_method in grouped(group, "method").items():
            look, budgets = looks[method], by_budget(of_method, names[method])
            for i, (label, its) in enumerate(budgets):
                courses = [[(place(shot), value(shot)) for shot in run["allocation"]] for run in counting(its)]
                draw_course(axes, courses, look, LINES[i % len(LINES)] if len(budgets) > 1 else look.line, label)
        axes.set_xlabel("training iteration (optimizer step)" if x == "step" else "unmasked weights")
        axes.set_ylabel(y_label)
        axes.set_ylim(0, 1)
        legend_outside(axes, style)

    figure = panels(runs, style, draw)
    note(figure, style, which_runs(runs, spread=False))
    return figure
