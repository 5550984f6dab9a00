"""Settings per task: the paper's Table 7 where it is known, ours where it is not, told apart."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from unmask.errors import ConfigError, need


@dataclass(frozen=True)
class Preset:
    """The settings of a task.

    Attributes:
        task: Its name.
        family: ``"nlu"``, ``"ner"`` or ``"arithmetic"``.
        paper: Settings that the paper has, by a source.
        source: That source.
        ours: Settings chosen here, because the paper's were not to be had.
    """

    task: str
    family: str
    paper: Mapping[str, Any]
    source: str
    ours: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All of them, for `unmask.settings.build`."""
        return {**self.ours, **self.paper}


@functools.cache
def presets() -> Mapping[str, Preset]:
    """Every task's settings, by name."""
    text = files("unmask.reproduce").joinpath("data", "table7.yaml").read_text(encoding="utf-8")
    found = {}
    for family, values in need("yaml", "cli").safe_load(text)["families"].items():
        for task, own in values["tasks"].items():
            paper = {**values["paper"], **own.get("paper", {})}
            found[task] = Preset(task, family, paper, values["from"], {**values["ours"], **own.get("ours", {})})
    return MappingProxyType(found)


def preset(task: str) -> Preset:
    """A task's settings.

    Raises:
        ConfigError: There are none for it.

    Example:
        >>> preset("cola").paper["exp"], preset("cola").ours["epochs"]
        (2, 10)
    """
    if task not in presets():
        raise ConfigError(f"there are no settings of the paper's for task {task!r}; there are {', '.join(presets())}.")
    return presets()[task]
