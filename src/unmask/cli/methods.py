"""``unmask methods``: the presets, from their own docstrings."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from unmask.methods import PRESETS


def run_methods() -> None:
    """Prints each preset's name, arguments and one line on what it does."""
    table = Table(show_lines=False)
    for column in ("method", "arguments (defaults)", "what it does"):
        table.add_column(column)
    for name, preset in sorted(PRESETS.items()):
        table.add_row(name, _arguments(preset), (inspect.getdoc(preset) or "").split("\n")[0])
    Console().print(table)


def _arguments(preset: object) -> str:
    parameters = inspect.signature(preset).parameters.values()  # type: ignore[arg-type]
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
