"""Expands a sweep into its cells: the settings of every run, and an id that depends on the settings alone. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unmask.errors import ConfigError
from unmask.lab.study.spec import Row, Sweep
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.settings import build
from unmask.methods.presets import PRESETS

Rank = Callable[[Mapping[str, Any]], int]
Group = tuple[tuple[str, str], ...]
"""The labels, as texts, that a group of cells has in common."""
MATCH = "match"
"""The value of ``lora_r`` that stands for the rank whose number of weights is nearest to the budget."""


@dataclass(frozen=True)
class Cell:
    """The place of a run in the grid. Two places can share a run.

    Attributes:
        id: The id of the run. The same settings have the same id on every machine and in every version.
        labels: The values of ``method`` (the row), the axes and the grid's settings at this place.
        settings: The settings of the run that differ from the defaults, without ``output``.
    """

    id: str
    labels: Mapping[str, Any]
    settings: Mapping[str, Any]

    def label(self, key: str) -> str:
        """Returns the value of a label, as text."""
        return str(self.labels.get(key))

    def group(self, *without: str) -> Group:
        """Returns all labels except some, as a key."""
        return tuple((key, str(value)) for key, value in self.labels.items() if key not in without)


def expand(sweep: Sweep, rank: Rank | None = None) -> list[Cell]:
    """Returns all cells of the full grid, in order.

    ``rank`` is the function from settings to the rank that ``lora_r: match`` stands for; None stands for
    `unmask.lab.study.matching.matching_rank`.

    Raises:
        ConfigError: The settings of a run cannot work; the message names the run by its labels.

    Example:
        >>> from unmask.lab.study.parsing import parse
        >>> sweep = parse({"settings": {"model": "m", "task": "rte", "budget": "1%"}, "axes": {"seed": [0, 1]},
        ...                "methods": {"id3": {"grid": {"lr": ["1e-3", "3e-3"]}}}})
        >>> [(cell.labels["seed"], cell.labels["lr"]) for cell in expand(sweep)]
        [(0, '1e-3'), (0, '3e-3'), (1, '1e-3'), (1, '3e-3')]
    """
    cells: dict[tuple[Any, ...], Cell] = {}
    for row, values in itertools.product(sweep.rows, itertools.product(*sweep.axes.values())):
        for labels, settings in _tried(sweep, row, dict(zip(sweep.axes, values, strict=True))):
            try:
                resolved = canonical(_matched(settings, rank))
            except ConfigError as error:
                where = ", ".join(f"{key} {value}" for key, value in labels.items())
                raise ConfigError(f"the run of {where}: {error}") from error
            cell = Cell(run_id(labels, resolved), labels, resolved)
            cells.setdefault((cell.id, cell.group()), cell)
    if pair := sweep.protocol.paired:
        for group, (tried, seeds) in places(cells.values(), pair).items():
            if len(tried) not in (1, len(seeds)):
                raise ConfigError(
                    f"the paper's protocol runs each {pair} with one seed, and {', '.join(v for _, v in group)} has "
                    f"{len(tried)} values of {pair} and {len(seeds)} seeds; give as many of both, or one {pair}, or "
                    "take the protocol seeds."
                )
    ordered = {**sweep.axes, "method": tuple(row.name for row in sweep.rows)}
    ranks = {key: {str(value): place for place, value in enumerate(values)} for key, values in ordered.items()}
    outer = sweep.nesting[: sweep.nesting.index("grid")]  # No two cells have the same place in the grid's order.
    return sorted(cells.values(), key=lambda cell: [ranks[key].get(cell.label(key), -1) for key in outer])


def places(cells: Iterable[Cell], setting: str) -> dict[Group, tuple[dict[str, int], dict[str, int]]]:
    """Numbers the values of a setting, and the seeds, in each group of cells that differ in these two alone."""
    found: dict[Group, tuple[dict[str, int], dict[str, int]]] = {}
    for cell in cells:
        values, seeds = found.setdefault(cell.group(setting, "seed"), ({}, {}))
        values.setdefault(cell.label(setting), len(values))
        seeds.setdefault(cell.label("seed"), len(seeds))
    return found


def _tried(sweep: Sweep, row: Row, place: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields (labels, settings) for every value of the place's grid."""
    labels = {"method": row.name, **place}
    settings, grid = dict(sweep.settings), dict(row.grid)
    for rule in [rule for rule in sweep.rules if rule.holds(labels)]:
        settings |= rule.settings
        grid |= {key: values for key, values in rule.grid.items() if key not in row.settings}
    settings |= {**place, **row.settings}
    if row.name in PRESETS:  # A row that is called pafi and names no method means PaFi.
        settings.setdefault("method", row.name)
    labels |= {axis: settings[axis] for axis in place if axis in row.settings}
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        yield labels | given, settings | given


def _matched(settings: Mapping[str, Any], rank: Rank | None) -> Mapping[str, Any]:
    """Replaces ``match`` by numbers, and drops the budget of a LoRA that is trained whole."""
    if settings.get("lora_r") != MATCH:
        return settings
    if settings.get("budget") is None or settings.get("into") is None:
        raise ConfigError("lora_r = 'match' needs a budget to match, and into (lora, dora or shira).")
    if rank is None:
        from unmask.lab.study.matching import matching_rank  # It imports torch.

        rank = matching_rank
    matched: dict[str, Any] = {"lora_r": rank(settings)}
    if settings.get("lora_alpha") == MATCH:
        matched["lora_alpha"] = matched["lora_r"]
    if settings.get("method") == "full":
        matched["budget"] = None
    return {**settings, **matched}


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's settings as JSON values, converted as for a training, without defaults and without ``output``.

    Example:
        >>> canonical({"model": "m", "task": "rte", "method": "pafi", "budget": 100, "lr": "3e-4", "seed": 0})
        {'model': 'm', 'task': 'rte', 'method': 'pafi', 'budget': '100', 'lr': 0.0003}
    """
    config = build({**settings, "output": "-"})
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    plain = {key: value for key, value in dataclasses.asdict(config).items() if value != defaults[key]}
    del plain["output"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def run_id(labels: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Returns the task, the method and a digest of the settings: ``sst2-id3-1f2e3d4c5b``."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    method = f"{settings['into']}_" if settings.get("into") else ""
    words = (str(settings.get("task") or "data"), f"{method}{settings.get('method', 'id3')}", digest)
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", word) for word in words)


def distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Returns one cell for each run, in order; of cells that share a run it keeps the first."""
    return list({cell.id: cell for cell in reversed(list(cells))}.values())[::-1]
