"""``unmask bench``: runs the benchmark and prints its tables."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unmask.errors import ConfigError
from unmask.files import check_folder
from unmask.lab.bench import tables
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.training.fields import converted


def run(given: dict[str, Any], command: str) -> None:
    """Checks the options as they were typed, measures, and prints the tables. The record holds the command line."""
    settings = BenchSettings(**converted(BenchSettings, given))
    if settings.curve in ("size", "selection") and given.get("model"):
        raise ConfigError(f"--curve {settings.curve} goes over a series of models; leave --model out.")
    if settings.calibrate:
        _calibrate(settings)
        return
    check_folder(settings.output, "--output")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    say = partial(print, flush=True)
    if settings.host:
        from unmask.lab.bench.host import run_host

        _print_table(tables.HOST, tables.host(run_host(settings, command)))
        print(f"written: {Path(settings.output, 'host.json')}")
        return
    if settings.delta:
        from unmask.lab.bench.deltas import run_deltas

        record = run_deltas(settings, command, say)
        print()
        _print_table(tables.DELTA, tables.delta(record))
        print(f"written: {Path(settings.output, 'delta.json')}")
        return
    if settings.curve:
        from unmask.lab.bench.curves import run_curve

        record = run_curve(settings, say, command)
    else:
        from unmask.lab.bench.run import run_bench

        record = run_bench(settings, say, command)
    print()
    if "points" in record:
        _print_table(*tables.curve(record))
    else:
        for header, lines in ((tables.TIMES, tables.times(record)), (tables.COSTS, tables.costs(record))):
            if lines:
                _print_table(header, lines)
        for remark in tables.remarks(record):
            print(remark)
    name = f"curve-{settings.curve}" if settings.curve else "bench"
    print(f"written: {Path(settings.output, name)}.json, .md, .png")


def _calibrate(settings: BenchSettings) -> None:
    """Measures what products cost on the device, for each dtype, and prints where it is kept."""
    import torch

    from unmask.gradients.choice import cache_file, calibrate
    from unmask.lab.bench.models import device_of

    device = device_of(settings)
    torch.set_num_threads(settings.threads)
    lines = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        costs = dataclasses.asdict(calibrate(device, dtype))
        lines.append([str(dtype)[6:], *(f"{cost:.3g}" for cost in costs.values())])
        folder = cache_file(device, dtype).parent
    _print_table(["ns", *costs], lines)
    print(f"kept in {folder}")


def _print_table(header: Sequence[str], lines: list[list[str]]) -> None:
    """Prints a table: with rich in a terminal that is wide enough, else as aligned text."""
    text, console = tables.plain(header, lines), Console()
    if not console.is_terminal or console.width < max(map(len, text.splitlines())) + 3 * len(header):
        print(text + "\n")
        return
    table = Table()
    for at, column in enumerate(header):
        table.add_column(column, justify="left" if at == 0 else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
