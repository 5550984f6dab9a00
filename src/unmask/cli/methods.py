"""``unmask methods``: lists the presets with their docstrings, and the parts of methods."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import get_args

from rich.console import Console
from rich.table import Table

from unmask.lab.training.recipe import RECIPE
from unmask.methods.heuristics import heuristic_names
from unmask.methods.method import Allocation
from unmask.methods.presets import PRESETS
from unmask.methods.schedules import SCHEDULES
from unmask.methods.scopes import Kind

WHEN: Mapping[str, str] = {
    "random_mask": "the first choice: nothing to compute, and the least loss in the study (over linear layers)",
    "id3": "the paper's method; where it matters which weights change, or when; a series of budgets from one run",
    "static_d3": "the control for id3: the same score, all at once",
    "repeat_d3": "the paper's repeat-S, for comparison; it selects again at every stride-th step",
    "pafi": "a mask that depends on no data, so that tasks can share it",
    "fish": "a static mask by the data, from a pass over examples before training",
    "bitfit": "the fewest weights and no choice to make; also without a budget",
    "sparse_adapter": "to prune a LoRA or adapters before they are trained (it needs --into)",
    "full": "the comparison: everything is trained, and the delta is as large as the model",
}
"""The use of each preset, in a line. docs/methods.md says more, and docs/results.md has the figures."""


def run_methods() -> None:
    """Prints what each preset does and when to use it, its arguments, and the parts that methods are composed of."""
    table = Table(show_lines=True)
    for column in ("method", "what it does", "when to use it", "arguments (defaults)"):
        table.add_column(column, no_wrap=column == "method")
    for name, preset in sorted(PRESETS.items(), key=lambda item: (item[0] != RECIPE["method"], item[0])):
        parameters = inspect.signature(preset).parameters.values()
        arguments = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
        marked = f"{name} *" if name == RECIPE["method"] else name
        table.add_row(marked, (inspect.getdoc(preset) or "").split("\n")[0], WHEN[name], arguments)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"* the method of `unmask train` without --method, with --scope {RECIPE['scope']}")
    parts = {
        "heuristics": heuristic_names(),
        "schedules": SCHEDULES,
        "allocations": get_args(Allocation),
        "scopes": get_args(Kind),
    }
    for part, values in parts.items():
        console.print(f"{part}: {', '.join(values)}", highlight=False)
