"""``unmask methods``: lists the presets with their docstrings, and the parts of methods."""

from __future__ import annotations

import inspect
from typing import get_args

from rich.console import Console
from rich.table import Table

from unmask.methods.heuristics import heuristic_names
from unmask.methods.method import Allocation
from unmask.methods.presets import PRESETS
from unmask.methods.schedules import SCHEDULES
from unmask.methods.scopes import Kind


def run_methods() -> None:
    """Prints each preset's name, arguments and one line on what it does, then the parts that methods are composed of."""
    table = Table(show_lines=False)
    for column in ("method", "arguments (defaults)", "what it does"):
        table.add_column(column)
    for name, preset in sorted(PRESETS.items()):
        parameters = inspect.signature(preset).parameters.values()
        arguments = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
        table.add_row(name, arguments, (inspect.getdoc(preset) or "").split("\n")[0])
    console = Console()
    console.print(table)
    parts = {
        "heuristics": heuristic_names(),
        "schedules": SCHEDULES,
        "allocations": get_args(Allocation),
        "scopes": get_args(Kind),
    }
    for part, values in parts.items():
        console.print(f"{part}: {', '.join(values)}", highlight=False)
