"""Reads the settings of a task from a preset: the paper's, or this project's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from unmask.errors import ConfigError, need

PRESETS = ("paper", "tuned")


@dataclass(frozen=True)
class Preset:
    """The settings of a task's runs.

    Attributes:
        name: ``"paper"`` or ``"tuned"``.
        task: The task's name.
        family: ``"nlu"``, ``"ner"`` or ``"arithmetic"``.
        source: Where the settings are from; for a task that the paper does not have, it says so.
        settings: What every run of the task has; see `unmask.lab.training.config.TrainConfig`.
        lora: What a run inside a LoRA has too.
        by_method: What a run of one method has too, by the method.
        rates: The learning rates to run a method with, as text.
        full_rates: Those of full fine-tuning; empty where it has the same.
        own_rates: Those of methods with a grid of their own, by what they are inside of (``"base"`` for the model itself) and
            then by the method.
        seeds: The seeds. In the paper's preset the first rate is run with the first seed, and so on.
        metric: The name of the score, as in `unmask.lab.tasks`; empty where the preset names none.
        unsaid: What the paper leaves open and what the runs do, in sentences; their settings are among ``settings``.
        unsaid_inside: The same, of runs inside of something alone, by that (``"lora"``, ``"pfeiffer"``).
    """

    name: str
    task: str
    family: str
    source: str
    settings: Mapping[str, Any]
    lora: Mapping[str, Any]
    by_method: Mapping[str, Mapping[str, Any]]
    rates: tuple[str, ...]
    full_rates: tuple[str, ...]
    own_rates: Mapping[str, Mapping[str, Sequence[str]]]
    seeds: tuple[int, ...]
    metric: str
    unsaid: tuple[str, ...]
    unsaid_inside: Mapping[str, tuple[str, ...]]

    def grid(self, method: str, into: str | None = None) -> tuple[str, ...]:
        """Gives the learning rates that a method is run with.

        Args:
            method: As in `unmask.lab.training.config.TrainConfig`.
            into: What the method is inside of (``"lora"``, ...); None for the model itself.

        Example:
            >>> preset("cola").grid("id3")
            ('1e-4', '3e-4', '5e-4', '7e-4')
            >>> preset("cola").grid("full"), preset("math10k").grid("full", into="lora")
            (('5e-6', '7e-6', '1e-5', '3e-5'), ('3e-4',))
        """
        own = self.own_rates.get(into or "base", {})
        if method in own:
            return tuple(own[method])
        return self.full_rates if self.full_rates and method == "full" and into is None else self.rates

    def run(self, method: str = "id3", into: str | None = None) -> dict[str, Any]:
        """Gives the settings of one run, for `unmask.lab.training.settings.build`: the second rate and seed, or the only ones.

        Args:
            method: As of `grid`.
            into: As of `grid`.

        Example:
            >>> run = preset("cola").run("full")
            >>> run["lr"], run["seed"], run["epochs"]
            ('7e-6', 7, 20)
            >>> run = preset("math10k").run(into="lora")
            >>> run["lr"], run["seed"], run["lora_alpha"]
            ('3e-4', 42, 16)
        """
        one = {"lr": self.grid(method, into)[:2][-1], "seed": self.seeds[:2][-1]}
        inside = self.lora if into == "lora" else {}
        return {**self.settings, **inside, **self.by_method.get(method, {}), **one}


@functools.cache
def presets(name: str = "paper") -> Mapping[str, Preset]:
    """Reads the settings of every task that a preset has, by the task's name.

    Args:
        name: ``"paper"``: the paper's settings, and an explicit one of this project's where the paper names none.
            ``"tuned"``: this project's own. The two are never mixed.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset = {name!r}; it must be {' or '.join(PRESETS)}.")
    values = read(name)
    found = {}
    for family, shared in values["families"].items():
        unsaid = [*values.get("unsaid", ()), *shared.get("unsaid", ())]
        chosen = {key: value for entry in unsaid for key, value in entry.get("settings", {}).items()}
        for task, own in shared["tasks"].items():
            found[task] = Preset(
                name=name,
                task=task,
                family=family,
                source=own.get("source", values["source"]),
                settings={**chosen, **shared["settings"], **{k: v for k, v in own.items() if k not in _NO_SETTINGS}},
                lora=shared.get("lora", {}),
                by_method=values.get("by_method", {}),
                rates=tuple(shared["rates"]),
                full_rates=tuple(shared["full_rates"]),
                own_rates=shared.get("own_rates", {}),
                seeds=tuple(shared["seeds"]),
                metric=own.get("metric", ""),
                unsaid=tuple(entry["says"] for entry in unsaid if "inside" not in entry),
                unsaid_inside={
                    into: tuple(entry["says"] for entry in unsaid if entry.get("inside") == into)
                    for into in ("lora", "pfeiffer")
                },
            )
    return MappingProxyType(found)


_NO_SETTINGS = ("source", "metric")


def preset(task: str, name: str = "paper") -> Preset:
    """Gives the settings of a task.

    Args:
        task: The task's name.
        name: As of `presets`.

    Raises:
        ConfigError: There is no such preset, or it has none for this task.

    Example:
        >>> cola = preset("cola")
        >>> cola.settings["exp"], cola.settings["epochs"], cola.seeds
        (2, 20, (6, 7, 8, 9))
        >>> preset("cola", "tuned").settings["epochs"]
        10
    """
    known = presets(name)
    if task not in known:
        raise ConfigError(f"the preset {name!r} has no settings for task {task!r}; it has some for {', '.join(known)}.")
    return known[task]


def read(name: str, package: str = "unmask.lab.training") -> dict[str, Any]:
    """Reads a YAML file of a package's folder ``data``: here a preset's, in `unmask.lab.study` that of a table or figure."""
    text = files(package).joinpath("data", f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = need("yaml", "cli").safe_load(text)
    return values
