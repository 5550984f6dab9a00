"""Reads the sweep of a table or figure of the paper, full or small, under the paper's settings or our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from unmask.errors import ConfigError
from unmask.lab.study.parsing import parse
from unmask.lab.study.spec import Rule, Sweep
from unmask.lab.training.paper import presets, read
from unmask.reading import choices

Scale = Literal["full", "small"]
NAMES = (
    "table1", "table2", "table3", "table4", "table5", "fig1", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9",
)  # fmt: skip


def load(name: str, scale: Scale = "full", preset: str = "paper") -> Sweep:
    """Returns the sweep of a table or figure; the caller sets ``model`` and ``data_dir``.

    Args:
        name: One of `NAMES`.
        scale: ``"full"``: the paper's runs. ``"small"``: real runs of a few steps, on few tasks and seeds, to see it
            work.
        preset: ``"paper"``: the paper's settings, learning rates, seeds and protocol. ``"tuned"``: this project's own
            instead.

    Raises:
        ConfigError: There is no such name, scale or preset.

    Example:
        >>> load("fig6").axes["budget"]
        ('80K of 184M', '160K of 184M', '320K of 184M', '640K of 184M')
        >>> load("table1").axes["seed"], load("table1", preset="tuned").axes["seed"]
        ((6, 7, 8, 9), (0, 1, 2, 3))
    """
    if name not in NAMES:
        raise ConfigError(f"there is no table or figure {name!r}; there are {choices(name, NAMES)}.")
    if scale not in ("full", "small"):
        raise ConfigError(f"scale = {scale!r}; it must be full or small.")
    known, values = presets(preset), read(name, "unmask.lab.study")
    small, unsaid = values.pop("small"), values.pop("unsaid")
    usual = known[values["axes"]["task"][0]]  # All tasks of a file are of one family.
    settings = values.get("settings", {})
    into = settings.get("into")
    if preset == "tuned":
        own = read("tuned")
        values |= {"protocol": own["protocol"], "choose": own["choose"]}
        values["axes"].pop("seed", None)
        for row in values["methods"].values():
            row.get("grid", {}).pop("lr", None)
        small["axes"]["seed"] = list(usual.seeds[: len(small["axes"]["seed"])])
        small["tries"] = 1
        note = "The learning rates, seeds and all other settings of the tasks are this project's own, not the paper's."
    else:
        inside = usual.unsaid_inside.get(into or "", ())
        note = "What the paper leaves open: " + " ".join([*unsaid, *inside, *usual.unsaid])
    values["axes"].setdefault("seed", list(usual.seeds))
    values["notes"] = [*values["notes"], note]
    for row in values["methods"].values():
        rates = usual.grid(row.get("settings", {}).get("method", "id3"), into)
        row["grid"] = {"lr": list(rates), **row.get("grid", {})}
    rules = []
    for task, found in known.items():
        ours = {**found.settings, **(found.lora if into == "lora" else {})}
        # A rule overrides the settings of every run, so it leaves out those that the sweep's file has.
        unset = {key: value for key, value in ours.items() if key not in settings}
        rules.append({"when": {"task": task}, "settings": unset})
    values["rules"] = [*rules, *values.get("rules", [])]
    sweep = parse({"name": name, **values})
    return shrunk(sweep, small) if scale == "small" else sweep


def shrunk(sweep: Sweep, small: Mapping[str, Any]) -> Sweep:
    """Returns the sweep with shorter runs, other axes, some of the rows, and the middle values of each grid.

    The settings override those of the sweep and its tasks, but not those of a method, which make it that method.
    """
    sweep = replace(sweep, rules=(*sweep.rules, Rule({}, small.get("settings", {}))))
    for axis, values in small.get("axes", {}).items():
        sweep = sweep.with_axis(axis, values)
    sweep = sweep.only(small.get("only", {}))
    tries = small.get("tries")
    if tries is None:
        return sweep
    rows = []
    for row in sweep.rows:
        starts = {key: max(0, (len(values) - tries) // 2) for key, values in row.grid.items()}
        middle = {key: values[starts[key] : starts[key] + tries] for key, values in row.grid.items()}
        rows.append(replace(row, grid=middle))
    return replace(sweep, rows=tuple(rows))
