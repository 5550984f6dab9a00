"""Reads the settings of a task from a preset: those of the paper, or those of this project."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from unmask.errors import ConfigError, need
from unmask.lab.training.fields import is_none
from unmask.lab.training.recipe import INSIDE_LORA, RECIPE

PRESETS = ("paper", "tuned")


@dataclass(frozen=True)
class Preset:
    """The settings of a task's runs under a preset.

    Attributes:
        family: The task's family: ``"nlu"``, ``"ner"`` or ``"arithmetic"``.
        source: The source of the settings. It says so where the paper does not have the task.
        settings: The settings of every run of the task, by the names of `unmask.lab.training.config.TrainConfig`.
        lora: Further settings of a run inside a LoRA.
        by_method: Further settings of a run of one method, by the method's name.
        rates: The learning rates to run a method with, as texts.
        full_rates: The learning rates of full fine-tuning; empty where they are the same.
        own_rates: The learning rates of methods that have their own, by what they select inside of (``"base"`` for the model
            itself) and then by the method's name.
        seeds: The seeds. In the paper's preset the first rate is run with the first seed, and so on.
        metric: The name of the score, as in `unmask.lab.tasks`; empty where the preset names none.
        unsaid: Sentences on what the paper leaves open and what the runs do there. ``settings`` holds the values.
        unsaid_inside: The same for runs inside added modules alone, by their kind (``"lora"``, ``"pfeiffer"``).
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
        """Returns the learning rates that a method is run with inside of ``into`` (None for the model itself).

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
        """Returns the settings of one run with the second rate and seed, for `unmask.lab.training.settings.build`.

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

    ``"paper"`` has the paper's settings, and others where the paper names none; ``"tuned"`` has our own ones.

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
            printed = {key: value for key, value in own.items() if key not in ("source", "metric")}
            found[task] = Preset(
                name=name,
                task=task,
                family=family,
                source=own.get("source", values["source"]),
                settings={**chosen, **shared["settings"], **printed},
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


def preset(task: str, name: str = "paper") -> Preset:
    """Returns the settings of a task.

    Raises:
        ConfigError: There is no such preset, or it has no settings for this task.

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
    """Reads a YAML file of a package's folder ``data``. Here it holds a preset, in `unmask.lab.study` a table or a figure."""
    text = files(package).joinpath("data", f"{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = need("yaml", "cli").safe_load(text)
    return values


def under_preset(name: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a run's settings, as plain values, over those of a preset.

    Args:
        name: ``"recommended"``: the recipe of `unmask.lab.training.recipe`, also where it is not the default. ``"paper"`` and
            ``"tuned"``: the settings of `Preset.run` for the run's ``task``, with ID3; under paper the rate is 3e-4 and the
            seed 7 (under method full 7e-6 and 7, on word problems 3e-4 and 42). None: the settings as they are; without a
            method they get the recipe when the configuration is built.
        settings: The run's settings.

    Raises:
        ConfigError: There is no such preset, or it has no settings for the task.

    Example:
        >>> under_preset("recommended", {"task": "cola", "lr": 3e-3})
        {'method': 'random_mask', 'scope': 'linear', 'lr': 0.003, 'dense_lr': 'auto', 'task': 'cola'}
        >>> run = under_preset("paper", {"task": "cola", "epochs": 1})
        >>> run["method"], run["lr"], run["seed"], run["batch_size"], run["epochs"]
        ('id3', '3e-4', 7, 16, 1)
    """
    into = None if is_none(settings.get("into")) else str(settings["into"])
    if name is None:
        return dict(settings)
    if name == "recommended":
        return {**(INSIDE_LORA if into == "lora" else RECIPE), **settings}
    if name in PRESETS:
        method = str(settings.get("method", "id3"))
        return {"method": method, **preset(str(settings.get("task")), name).run(method, into), **settings}
    raise ConfigError(f"preset = {name!r}; there are recommended, paper and tuned.")
