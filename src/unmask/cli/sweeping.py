"""``unmask sweep`` and ``unmask reproduce``: run grids of trainings and write their tables."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unmask.cli.options import SweepOptions
from unmask.errors import ConfigError, MissingExtraError
from unmask.files import check_folder, write_text
from unmask.lab.study.cells import Cell, distinct, expand
from unmask.lab.study.choosing import due
from unmask.lab.study.live import describe, outcome
from unmask.lab.study.records import records
from unmask.lab.study.scheduler import run_sweep
from unmask.lab.study.spec import Sweep
from unmask.lab.study.store import Result, Store
from unmask.lab.study.tables import markdown, tables
from unmask.lab.training.settings import parse_assignments

_Texts = Sequence[str] | None


def go(sweep: Sweep, output: Path, options: SweepOptions) -> None:
    """Runs a sweep and writes its table and figures, or lists its runs. Ends with status 1 if runs failed."""
    check_folder(output, "--output")
    cells, store, console = expand(sweep), Store(output), Console()
    if options.dry_run:
        console.print(listing(sweep, cells, store.results()))
        return
    made = run_sweep(
        sweep,
        store,
        workers=options.workers,
        threads=options.threads,
        devices=options.devices,
        engine=options.engine,
        retry_failed=options.retry_failed,
        console=console,
        command=shlex.join(["unmask", *sys.argv[1:]]),
        cells=cells,
    )
    found = tables(made.cells, made.results, sweep.protocol, sweep.choice, sweep.claims)
    shown = found if sweep.protocol.pair else found[:1]  # the report has the others
    text = "\n\n".join([*sweep.notes, *map(markdown, shown)])
    write_text(store.folder / "table.md", f"{text}\n")
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(text)
    if sweep.figures:
        from unmask.lab.report.drawing import draw_files

        rows = records(made.cells, made.results, sweep.protocol, sweep.choice)
        try:
            for path in draw_files(sweep.figures, rows, store.folder / "figures"):
                say(f"figure: {path}")
        except MissingExtraError as error:
            say(f"no figures: {error}")
    say(f"report: unmask report {store.folder} --output report.html")
    for result in made.failed:
        say(f"{result['id']}  {outcome(result)}", style="red")
    if made.failed:
        say(f"{len(made.failed)} runs failed; --retry-failed does them again. Logs: {store.folder / 'logs'}")
        raise typer.Exit(1)


def changed(sweep: Sweep, axes: _Texts, only: _Texts, assignments: _Texts, **given: str | None) -> Sweep:
    """Returns the sweep with the changes of the command line: axes, then filters, then settings (given or assigned)."""
    for axis, values in _pairs("--axis", axes).items():
        sweep = sweep.with_axis(axis, values)
    settings = {key: value for key, value in given.items() if value is not None}
    return sweep.only(_pairs("--only", only)).with_settings(settings | parse_assignments(assignments or []))


def with_protocol(sweep: Sweep, kind: str | None) -> Sweep:
    """Returns the sweep under another protocol, which the protocol's class checks; None leaves the sweep's own."""
    return sweep if kind is None else replace(sweep, protocol=replace(sweep.protocol, kind=cast(Any, kind)))


def _pairs(option: str, texts: _Texts) -> dict[str, list[str]]:
    pairs = {}
    for text in texts or ():
        key, sign, values = text.partition("=")
        if not sign or not values:
            raise ConfigError(f"{option} {text!r}: write name=value or name=value,value.")
        pairs[key.strip()] = [value.strip() for value in values.split(",")]
    return pairs


def listing(sweep: Sweep, cells: Sequence[Cell], results: dict[str, Result]) -> Table:
    """Returns a table of the runs in order, with the state of each."""
    now = {cell.id for cell in due(cells, sweep.protocol, sweep.choice, results)}
    pairs_alone = sweep.protocol.kind == "paper" and sweep.protocol.pair is not None
    listed = [cell for cell in distinct(cells) if cell.id in now or not pairs_alone]
    shown = Table(title=f"{sweep.name}: {len(listed)} runs", title_justify="left")
    for column in ("", "run", "", "state"):
        shown.add_column(column, justify="right" if not shown.columns else "left", overflow="fold")
    for number, cell in enumerate(listed, start=1):
        state = (
            outcome(results[cell.id]) if cell.id in results else "to run" if cell.id in now else "if its rate is chosen"
        )
        shown.add_row(str(number), cell.id, escape(describe(cell)), escape(state))
    return shown
