"""A whole benchmark: memory, then times, then tables and a figure; the record is on the disk after every part."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from unmask.errors import MissingExtraError
from unmask.files import write_json, write_text
from unmask.lab.bench.figures import draw
from unmask.lab.bench.grouping import too_large
from unmask.lab.bench.machine import available_bytes, describe_machine
from unmask.lab.bench.memory import measure
from unmask.lab.bench.models import Blueprint, blueprint, device_of
from unmask.lab.bench.quiet import quiet_torch
from unmask.lab.bench.record import derive, verdicts
from unmask.lab.bench.rounds import RowResult
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.tables import markdown
from unmask.lab.bench.timed import Say, estimates, refuse_missing, time_rows


def run_bench(settings: BenchSettings, say: Say = print, command: str | None = None) -> dict[str, Any]:
    """Measures every row and writes ``bench.json``, ``bench.md`` and ``bench.png`` into the output folder.

    Args:
        settings: The run, without a curve.
        say: Takes lines of progress.
        command: The command line, for the record.

    Returns:
        The record, as in ``bench.json``.
    """
    with quiet_torch(settings.threads):
        plan = blueprint(settings)
        results = [RowResult(row) for row in settings.rows()]
        refuse_missing(results)
        record = header(settings, command)
        record["model"] = plan.describe()

        def save() -> None:
            record["rows"] = derive(results, record["model"]["tokens"])
            shape, device = plan.shape, plan.device.type
            record["verdicts"] = verdicts(results, record["rows"], settings, shape.batch, shape.length, device)
            write_json(Path(settings.output, "bench.json"), record)

        save()
        if settings.memory:
            _measure_memory(results, plan, settings, say, save)
        if settings.timing:
            processes = plan.device.type == "cpu" if settings.processes is None else settings.processes
            record["grouping"] = time_rows(results, plan, settings, say, save, processes)
        _settle(results)
        record["complete"] = True
        save()
        write_reports(record, settings, "bench", say)
    return record


def header(settings: BenchSettings, command: str | None) -> dict[str, Any]:
    """What every record starts with."""
    return {
        "complete": False,
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": settings.as_json(),
        "machine": describe_machine(device_of(settings), settings.threads),
        "model": None,
        "grouping": None,
        "rows": {},
    }


def write_reports(record: dict[str, Any], settings: BenchSettings, name: str, say: Say) -> None:
    """The page and the figure beside the JSON; without matplotlib the figure is left out, and that is said."""
    folder = Path(settings.output)
    write_text(folder / f"{name}.md", markdown(record))
    try:
        draw(record, folder / f"{name}.png")
    except MissingExtraError as error:
        say(f"{name}.png was not drawn: {error}")


def _measure_memory(results: list[RowResult], plan: Blueprint, settings: BenchSettings, say: Say, save: Any) -> None:
    held, step = estimates(results, plan)
    for result in results:
        if result.status != "waiting":
            continue
        label = result.row.label
        large = too_large([label], held, step, available_bytes(plan.device))
        result.memory = {"error": large} if large else measure(settings, result.row)
        peak = result.memory.get("peak_mb")
        say(f"memory, {label}: " + (f"{peak:,.0f} MB" if peak else result.memory["error"]))
        save()


def _settle(results: list[RowResult]) -> None:
    """Rows of a run without times are ok if their memory could be measured."""
    for result in results:
        if result.status == "waiting":
            error = result.memory.get("error")
            result.status, result.reason = ("failed", error) if error else ("ok", None)
