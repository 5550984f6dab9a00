"""Reads the sweep of a table or figure, whole or small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any, Literal

from unmask.errors import ConfigError, need
from unmask.reproduce.table7 import presets
from unmask.sweeps.spec import Rule, Sweep, parse

Scale = Literal["full", "small"]
NAMES = (
    "table1", "table2", "table3", "table4", "table5", "fig1", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9",
)  # fmt: skip


def load(name: str, scale: Scale = "full") -> Sweep:
    """The sweep of a table or figure; ``model`` and ``data_dir`` are still to be set.

    Args:
        name: One of `NAMES`.
        scale: ``"full"``: as in the paper, as far as that is known. ``"small"``: few steps, tasks and seeds, to see it work.

    Raises:
        ConfigError: No such name or scale.

    Example:
        >>> load("fig6").axes["budget"]
        (100000, 200000, 320000, 500000, 1000000)
    """
    if name not in NAMES:
        raise ConfigError(f"there is nothing to reproduce of the name {name!r}; there are {', '.join(NAMES)}.")
    if scale not in ("full", "small"):
        raise ConfigError(f"scale = {scale!r}; it must be full or small.")
    values = read(name)
    small, uses_presets = values.pop("small", {}), values.pop("preset", None) == "table7"
    sweep = parse({"name": name, **values})
    if uses_presets:
        sweep = replace(sweep, rules=(*_preset_rules(), *sweep.rules))
    return shrunk(sweep, small) if scale == "small" else sweep


def read(name: str) -> dict[str, Any]:
    """A data file of this package."""
    text = files("unmask.reproduce").joinpath("data", f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = need("yaml", "cli").safe_load(text)
    return values


def shrunk(sweep: Sweep, small: Mapping[str, Any]) -> Sweep:
    """A sweep with other settings for all runs, other axes, some rows, and fewer values in each grid (around the middle)."""
    sweep = sweep.with_settings(small.get("settings", {}))
    for axis, values in small.get("axes", {}).items():
        sweep = sweep.with_axis(axis, values)
    sweep = sweep.only(small.get("only", {}))
    tries = small.get("tries")
    if tries is None:
        return sweep
    return replace(sweep, rows=tuple(replace(row, grid=_middle(row.grid, tries)) for row in sweep.rows))


def _middle(grid: Mapping[str, tuple[Any, ...]], count: int) -> dict[str, tuple[Any, ...]]:
    starts = {key: max(0, (len(values) - count) // 2) for key, values in grid.items()}
    return {key: values[starts[key] : starts[key] + count] for key, values in grid.items()}


def _preset_rules() -> list[Rule]:
    return [Rule({"task": (task,)}, preset.settings) for task, preset in presets().items()]
