"""The recommended recipe: what ``unmask train`` does where no method is named. No torch here.

Chosen, and confirmed on tasks that it was not chosen on, in experiments/study; docs/results.md has the figures, and where it loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unmask.errors import ConfigError

RECIPE: Mapping[str, Any] = MappingProxyType(
    {
        "method": "id3",
        "scope": "linear",
        "allocation": "column",
        "schedule": "front-loaded",
        "stride": 10,
        "lr": 1e-2,
    }
)


def under_preset(name: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings over those of a preset.

    Args:
        name: ``"recommended"``; ``"paper"``, the paper's settings for the task; None: recommended, unless ``settings`` name
            a method, which then comes with its own defaults.
        settings: A run's, with ``task`` where the preset is the paper's.

    Raises:
        ConfigError: No such preset, or none for the task.

    Example:
        >>> under_preset(None, {"task": "cola", "lr": 1e-3})["allocation"]
        'column'
        >>> under_preset(None, {"task": "cola", "method": "pafi"})
        {'task': 'cola', 'method': 'pafi'}
        >>> under_preset("paper", {"task": "cola", "epochs": 1})["batch_size"]
        16
    """
    if name is None:
        name = "recommended" if settings.get("method") is None else "none"
    if name == "paper":
        from unmask.reproduce import preset

        return {"method": "id3", **preset(str(settings.get("task"))).settings, **settings}
    if name not in ("recommended", "none"):
        raise ConfigError(f"preset = {name!r}; there are recommended and paper.")
    return {**(RECIPE if name == "recommended" else {}), **settings}
