"""Reads what a report is made from: a sweep's folder, or folders of runs of ``unmask train``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError, DataError
from unmask.lab.study.cells import Cell, canonical, run_id
from unmask.lab.study.curves import read_run
from unmask.lab.study.parsing import read_choice, read_claims, read_protocol
from unmask.lab.study.spec import Choice, Claims, Protocol
from unmask.lab.study.store import Result, Results, Store
from unmask.lab.training.config import FREE
from unmask.lab.training.settings import read_yaml

_NAMING = ("method", "into", "task", "budget", "seed", "lr")
"""The settings that are labels of every run, in this order. Other settings are labels where runs differ in them."""


@dataclass(frozen=True)
class Study:
    """The cells of a grid of runs, and their results.

    Attributes:
        name: The name of the sweep, or of the folder.
        title: The title of the report; it may be empty.
        cells: The cells of the full grid.
        results: The results of the runs that have ended, by run id.
        choice: How the swept setting was chosen; None if none was chosen.
        protocol: How the runs of a cell become one figure.
        notes: Paragraphs that a reader must know.
        figures: The figures to draw; None for all figures that the runs have the data for.
        claims: The figures that the paper prints for this table; None if there are none.
        command: The command line of the sweep; empty if there was none.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    results: Results
    choice: Choice | None = None
    protocol: Protocol = field(default_factory=Protocol)
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] | None = None
    claims: Claims | None = None
    command: str = ""


def read_study(folder: str | Path) -> Study:
    """Reads a sweep's folder, or a folder that holds outputs of ``unmask train`` at any depth.

    Raises:
        DataError: The folder holds neither, or a file in it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}; give a folder of a sweep or of runs of `unmask train`.")
    file = folder / "sweep.json"
    if not file.is_file():
        return _of_runs(folder)
    plan = Store(folder).plan()
    try:
        results = Store(folder).results()
        cells = tuple(Cell(c["id"], c["labels"], c["settings"]) for c in plan["cells"])
        return Study(
            name=plan["name"],
            title=plan["title"],
            cells=cells,
            results={cell.id: results[cell.id] for cell in cells if cell.id in results},
            choice=read_choice(plan["choose"]),
            protocol=read_protocol(plan["protocol"]),
            notes=tuple(plan["notes"]),
            figures=tuple(plan["figures"]) or None,
            claims=read_claims(plan["claims"]),
            command=plan["command"],
        )
    except ConfigError as error:
        raise DataError(f"{str(file)!r} is not a sweep of this version ({error}); run the sweep again.") from error


def _of_runs(folder: Path) -> Study:
    """Returns the runs below a folder. A run's labels are what names it, and every further setting in which the runs differ."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []  # the run's folder, settings and result
    for path in sorted(folder.rglob("summary.json")):
        made, config = read_run(path.parent), path.with_name("config.yaml")
        if made is not None and config.is_file():
            place = path.parent.relative_to(folder).as_posix()
            found.append((place, {"method": "id3"} | canonical(read_yaml(config)), made))
    if not found:
        raise DataError(f"{str(folder)!r} holds no sweep and no finished run of `unmask train` (no summary.json).")
    settings = [own for _, own, _ in found]
    names = [key for key in _NAMING if any(key in own for own in settings)]
    names += sorted({key for own in settings for key in own if key not in (*names, *FREE) and _differs(key, settings)})
    identities = [tuple(_shown(own.get(key)) for key in names) for own in settings]
    cells: list[Cell] = []
    results: dict[str, Result] = {}
    for (place, own, made), identity in zip(found, identities, strict=True):
        labels = {key: value for key, value in zip(names, identity, strict=True) if value is not None}
        if identities.count(identity) > 1:  # the same run, made again
            labels["run"] = place
        cell = Cell(f"{run_id(labels, own)}-{len(cells)}", labels, own)
        cells.append(cell)
        results[cell.id] = {**vars(cell), "status": "done", "seconds": made["summary"].get("seconds"), **made}
    return Study(folder.resolve().name, "", tuple(cells), results)


def _differs(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    return any(own.get(key) != settings[0].get(key) for own in settings)


def _shown(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value
