"""Draws a study's figures, as inline SVG and as files."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import DataError, UnmaskError
from unmask.lab.figures import FIGURES, Style, svg, write_figure
from unmask.lab.figures.records import RunRecord
from unmask.reading import choices

CAPTIONS = {
    "fig1": "The average score over all columns of all tasks, in %, over the trained weights in % of the model. The "
    "axis is linear; a larger marker trains more weights; full fine-tuning is a line across.",
    "fig4": "The score over eps of D3 at one exp (a), and over exp at one eps (b), on linear axes.",
    "fig5": "The score along the run over the number of updated weights, on a linear axis: every checkpoint of an "
    "increment-S run is a model of a smaller budget. Repeat-S is a line across, labelled with the number of weights "
    "that it tuned.",
    "fig6": "The score over the budget B, on a linear axis.",
    "fig7": "The places of the budget, at the start and at the end of the run: module kinds by layers. A cell is its "
    "share of the budget, and each panel has its own colour scale.",
    "fig8": "The share of tensors without any unmasked weight, 0 to 1, over the optimizer steps.",
    "fig9": "The entropy of the tensors' densities over the optimizer steps, divided by its largest value, "
    "ln(tensors). The paper does not state its normalisation; this one is ours.",
}


def fitting(name: str, records: Sequence[RunRecord]) -> list[RunRecord]:
    """Returns the records that a figure can show: those that have its data.

    The figures of an allocation show increment-S and repeat-S. They show static masks, whose allocation does not
    change, only if there is neither.
    """
    if name == "fig4":
        return [r for r in records if {"eps", "exp"} <= r.get("parameters", {}).keys()]
    ours = [r for r in records if r.get("strategy") != "none"]
    if name == "fig5":
        return [r for r in ours if r.get("strategy") != "increment" or r.get("curve")]
    if name in ("fig7", "fig8", "fig9"):
        kept = [r for r in ours if r.get("allocation")]
        return [r for r in kept if r.get("strategy") in ("increment", "repeat")] or kept
    return ours if name == "fig6" else list(records)


def worth_drawing(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """Returns the names of the figures that these runs have data for, for a study that names none."""
    budgets = {r["budget"] for r in records if r["share"] < 0.5}
    names = ["fig1"] if len(budgets) > 1 else []
    names += ["fig5"] if any(r.get("strategy") == "increment" and len(r.get("curve", [])) > 2 for r in records) else []
    names += ["fig7", "fig8", "fig9"] if fitting("fig7", records) else []
    return tuple(names)


def inline(names: Iterable[str], records: Sequence[RunRecord], anchor: str) -> list[dict[str, str | None]]:
    """Returns what the page shows of each figure: an ``<svg>`` element, or the reason why it cannot be drawn.

    Every id in an element begins with the anchor, so that the ids of a page differ.
    """
    drawn: list[dict[str, str | None]] = []
    for name in names:
        shown: dict[str, str | None]
        shown = {"id": f"{anchor}-{name}", "caption": CAPTIONS.get(name, name), "svg": None, "fault": ""}
        try:
            shown["svg"] = _prefixed(svg(_draw(name, records), f"{anchor}{name}"), f"{anchor}-{name}-")
        except (UnmaskError, ValueError) as error:  # Matplotlib reads a $ in a name as mathematics.
            shown["fault"] = str(error)
        drawn.append(shown)
    return drawn


def draw_files(names: Iterable[str], records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Writes each figure as PNG (light and dark) and SVG, and returns the files; it leaves out what cannot be drawn."""
    written: list[Path] = []
    for name in names:
        with contextlib.suppress(ValueError):  # It cannot be drawn (a DataError, or Matplotlib's); the report says why.
            written += write_figure(_draw(name, records), folder / name)
    return written


def _draw(name: str, records: Sequence[RunRecord]) -> Callable[[Style], Any]:
    if name not in FIGURES:
        raise DataError(f"there is no figure {name!r}; there are {choices(name, FIGURES)}.")
    shown = fitting(name, records)
    return lambda style: FIGURES[name](shown, style)


def _prefixed(element: str, prefix: str) -> str:
    """Puts a prefix before the ids of an SVG element and references to them; ids without a reference are left out."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', element))
    element = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", element)
    return re.sub(r'(href="#|url\(#)', rf"\1{prefix}", element)
