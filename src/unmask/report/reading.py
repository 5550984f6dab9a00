"""What a report is made of: a sweep's folder, or folders of runs of ``unmask train``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.settings import read_yaml
from unmask.sweeps.cells import Cell, canonical, run_id
from unmask.sweeps.spec import Choice, Claims, Protocol, read_claims
from unmask.sweeps.store import Result, Store


@dataclass(frozen=True)
class Study:
    """A grid of runs and what came of it.

    Attributes:
        name: Of the sweep, or of the folder.
        title: For people; may be empty.
        cells: The full grid.
        results: Of the runs that have ended.
        choice: How the swept setting was chosen.
        protocol: How seeds become one figure.
        notes: What a reader must know.
        figures: Figures to draw; None for all that the runs have the data for.
        claims: The figures that the paper prints for this table; None for none.
        command: What made it.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    results: Mapping[str, Result]
    choice: Choice | None = None
    protocol: Protocol = field(default_factory=Protocol)
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] | None = None
    claims: Claims | None = None
    command: str = ""


def read_study(folder: str | Path) -> Study:
    """Reads a sweep's folder, or any folder that holds outputs of ``unmask train``, at whatever depth.

    Raises:
        DataError: It holds neither, or a file in it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}; give a folder of a sweep or of runs of `unmask train`.")
    return _of_sweep(Store(folder)) if (folder / "sweep.json").is_file() else _of_runs(folder)


def _of_sweep(store: Store) -> Study:
    plan = store.plan()
    try:
        choice, results = plan["choose"], store.results()
        cells = tuple(Cell(c["id"], c["labels"], c["settings"]) for c in plan["cells"])
        return Study(
            name=plan["name"],
            title=plan["title"],
            cells=cells,
            results={cell.id: results[cell.id] for cell in cells if cell.id in results},
            choice=Choice(**{**choice, "seeds": tuple(choice["seeds"])}) if choice else None,
            protocol=Protocol(**plan["protocol"]),
            notes=tuple(plan["notes"]),
            figures=tuple(plan["figures"]) or None,
            claims=read_claims(plan["claims"]),
            command=plan["command"],
        )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{str(store.folder / 'sweep.json')!r} is no sweep of this version ({error!r}); run it again."
        ) from error


def _of_runs(folder: Path) -> Study:
    cells: list[Cell] = []
    results: dict[str, Result] = {}
    for path in sorted(folder.rglob("summary.json")):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{str(path)!r} cannot be read ({error}); remove that run, or finish it.") from error
        if not (path.parent / "config.yaml").is_file() or "main_metric" not in summary:
            continue
        settings = canonical(read_yaml(path.parent / "config.yaml"))
        labels = {"method": settings.get("method", "id3")} | {
            key: settings.get(key) for key in ("into", "task", "budget", "seed", "lr") if settings.get(key) is not None
        }
        cell = Cell(f"{run_id(labels, settings)}-{len(cells)}", labels, settings)
        cells.append(cell)
        results[cell.id] = _result(path.parent, summary, cell)
    if not cells:
        raise DataError(f"{str(folder)!r} holds no sweep and no finished run of `unmask train` (no summary.json).")
    return Study(folder.resolve().name, "", tuple(cells), results)


def _result(folder: Path, summary: dict[str, Any], cell: Cell) -> Result:
    from unmask.sweeps.curves import curve, read_rows, scores

    return {
        "id": cell.id,
        "status": "done",
        "labels": dict(cell.labels),
        "settings": dict(cell.settings),
        "seconds": summary.get("seconds"),
        **scores(summary),
        "summary": summary,
        "curve": curve(read_rows(folder / "metrics.jsonl"), summary),
        "allocation": read_rows(folder / "allocation.jsonl"),
    }
