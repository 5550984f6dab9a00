"""A run's configuration from plain values, of a YAML file or of the command line, and back. No torch here."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from unmask.config import TrainConfig
from unmask.errors import ConfigError, need
from unmask.tasks.names import TASKS
from unmask.writing import write_text

_HINTS = typing.get_type_hints(TrainConfig)
# where a kind of task wants another default than the rest: a solution is longer than a sentence
_KIND_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"generation": {"max_length": 512}}


def build(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from plain values (of a YAML file, or texts of the command line).

    Raises:
        ConfigError: An unknown key, a missing one, or a value of the wrong type.

    Example:
        >>> build({"model": "m", "output": "o", "task": "sst2", "budget": "1%", "lr": "3e-4"}).lr
        0.0003
    """
    unknown = sorted(set(values) - set(_HINTS))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; there are {', '.join(sorted(_HINTS))}.")
    required = {f.name for f in dataclasses.fields(TrainConfig) if f.default is dataclasses.MISSING}
    absent = sorted(required - {key for key, value in values.items() if value is not None})
    if absent:
        raise ConfigError(f"{' and '.join(absent)} must be given.")
    defaults = _KIND_DEFAULTS.get(TASKS.get(str(values.get("task")), ""), {})
    return TrainConfig(**{key: _convert(key, value) for key, value in {**defaults, **values}.items()})


def _convert(key: str, value: Any) -> Any:
    hint = _HINTS[key]
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    words = [word for option in options if typing.get_origin(option) is Literal for word in typing.get_args(option)]
    kind = next(option for option in options if option is not type(None))
    if is_none(value):
        if type(None) in options:
            return None
        return () if typing.get_origin(hint) is tuple else _bad(key, value, kind, words)
    if value in words:
        return value
    if typing.get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in parts)
    if kind is bool:
        return _as_bool(key, value)
    try:
        number = kind(value)
    except (TypeError, ValueError):
        return _bad(key, value, kind, words)
    return number if kind is str or number == float(value) else _bad(key, value, kind, words)


def is_none(value: Any) -> bool:
    """Whether a setting is none, also as a text of the command line."""
    return value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))


def _as_bool(key: str, value: Any) -> bool:
    texts = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return texts[str(value).lower()] if str(value).lower() in texts else _bad(key, value, bool)


def _bad(key: str, value: Any, kind: Any, words: Iterable[str] = ()) -> Any:
    name = getattr(kind, "__name__", str(kind))
    raise ConfigError(f"{key} = {value!r} is no {name}{''.join(f', nor {word}' for word in words)}.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file: a flat mapping.

    Raises:
        ConfigError: No such file, or not a mapping.
    """
    yaml = need("yaml", "cli")
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {str(path)!r}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{str(path)!r} must hold a mapping of settings (lr: 0.001), not a {type(values).__name__}.")
    return values


def write_yaml(config: TrainConfig, path: Path) -> None:
    """Writes the resolved configuration; `read_yaml` and `build` give it back."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }
    write_text(path, need("yaml", "cli").safe_dump(plain, sort_keys=False))


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """``--set key=value`` texts as a mapping.

    Example:
        >>> parse_assignments(["lr=1e-3", "include=query,value"])
        {'lr': '1e-3', 'include': 'query,value'}
    """
    pairs = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign:
            raise ConfigError(f"--set {assignment!r}: write key=value.")
        pairs[key.strip()] = value.strip()
    return pairs
