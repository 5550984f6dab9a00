"""A study's figures, as inline SVG and as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import MissingExtraError, UnmaskError
from unmask.figures import FIGURES, Style, svg, write_figure
from unmask.figures.records import RunRecord
from unmask.sweeps.cells import Cell
from unmask.sweeps.choosing import choose
from unmask.sweeps.records import record
from unmask.sweeps.spec import Choice
from unmask.sweeps.store import Result

CAPTIONS = {
    "fig1": "Score against the share of trained weights.",
    "fig4": "Score over eps and exp of D3.",
    "fig5": "Score along the run: every checkpoint of an increment-S run is a model of a smaller budget.",
    "fig6": "Score over budgets.",
    "fig7": "Where the budget went, at the start and at the end of the run: layer by module kind.",
    "fig8": "Share of tensors without any unmasked weight, along the run.",
    "fig9": "Entropy of the allocation over tensors, along the run.",
}
_OWN = ("method", "task", "budget", "seed", "model", "eps", "exp", "lr")  # labels that a record has a place for


def chosen_records(cells: Iterable[Cell], results: Mapping[str, Result], choice: Choice | None) -> list[RunRecord]:
    """Records of the runs that count: at the chosen value of the swept setting; other axes become part of the method's name.

    Args:
        cells: The full grid.
        results: By run id.
        choice: Of the sweep.
    """
    cells = list(cells)
    chosen = choose(cells, choice, results) if choice else {}
    found: dict[str, RunRecord] = {}
    for cell in cells:
        if choice and str(cell.labels.get(choice.setting)) != str(chosen[cell.group(choice.setting, "seed")].value):
            continue
        made = record(cell, results[cell.id]) if cell.id in results else None
        if made is not None:
            swept = choice.setting if choice else "lr"
            more = [f"{k} {v}" for k, v in cell.labels.items() if k not in (*_OWN, swept) and v is not None]
            made["method"] = " ".join([made["method"], *more])
            found.setdefault(cell.id, made)
    return list(found.values())


def fitting(name: str, records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records that a figure can show: those that have its data."""
    if name == "fig4":
        return [r for r in records if {"eps", "exp"} <= r.get("parameters", {}).keys()]
    if name == "fig5":
        kept = [r for r in records if r.get("strategy") != "none"]
        return [r for r in kept if r["strategy"] != "increment" or r.get("curve")]
    if name == "fig6":
        return [r for r in records if r.get("strategy") != "none"]
    if name in ("fig7", "fig8", "fig9"):
        return [r for r in records if r.get("allocation") and r.get("strategy") != "none"]
    return list(records)


def worth_drawing(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """The figures that say something of these runs, where nobody has said which to draw."""
    budgets = {r["share"] for r in records if r["share"] < 0.5}
    names = ["fig1"] if len(budgets) > 1 else []
    names += ["fig5"] if any(r.get("strategy") == "increment" and len(r.get("curve", [])) > 2 for r in records) else []
    names += ["fig7", "fig8", "fig9"] if fitting("fig7", records) else []
    return tuple(names)


def inline(names: Iterable[str], records: Sequence[RunRecord], salt: str = "") -> dict[str, str | UnmaskError]:
    """Each figure as an ``<svg>`` element, or why it could not be drawn.

    Args:
        names: Keys of `unmask.figures.FIGURES`.
        records: Of the runs that count.
        salt: Begins every id, so that no two on a page are alike.
    """
    drawn: dict[str, str | UnmaskError] = {}
    for name in names:
        try:
            drawn[name] = _prefixed(svg(_draw(name, records), f"{salt}{name}"), f"{salt}-{name}-")
        except UnmaskError as error:
            drawn[name] = error
        except ValueError as error:  # matplotlib reads a $ in a name as mathematics
            drawn[name] = UnmaskError(str(error))
    return drawn


def draw_files(names: Iterable[str], records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Writes each figure as PNG (light and dark) and SVG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    written: list[Path] = []
    for name in names:
        try:
            written += write_figure(_draw(name, records), folder / name)
        except MissingExtraError:
            raise
        except UnmaskError:  # nothing to draw yet; the report says why
            continue
    return written


def _draw(name: str, records: Sequence[RunRecord]) -> Callable[[Style], Any]:
    shown = fitting(name, records)
    return lambda style: FIGURES[name](shown, style)


def _prefixed(element: str, prefix: str) -> str:
    """An SVG element with a prefix to every id and every reference to one; ids that nothing refers to are left out."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', element))
    element = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", element)
    return re.sub(r'(href="#|url\(#)', rf"\1{prefix}", element)
