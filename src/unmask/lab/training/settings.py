"""A run's configuration from plain values, of a YAML file or of the command line, and back. No torch here."""

from __future__ import annotations

import dataclasses
import datetime
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from unmask.errors import ConfigError, need
from unmask.files import write_text
from unmask.lab.tasks.names import TASKS
from unmask.lab.training.config import TrainConfig
from unmask.reading import DEEPEST, Malformed, bounded, read_text, refusing, shown

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
    unknown = [key for key in values if key not in _HINTS]
    if unknown:
        raise ConfigError(f"unknown setting {shown(unknown[0])}; there are {', '.join(sorted(_HINTS))}.")
    required = {f.name for f in dataclasses.fields(TrainConfig) if f.default is dataclasses.MISSING}
    absent = sorted(required - {key for key, value in values.items() if value is not None})
    if absent:
        raise ConfigError(f"{' and '.join(absent)} must be given.")
    task = values.get("task")
    defaults = _KIND_DEFAULTS.get(TASKS.get(task, "") if isinstance(task, str) else "", {})
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
    if isinstance(value, str) and value in words:
        return value
    if typing.get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        listed = isinstance(parts, list | tuple) and all(isinstance(part, str | int | float) for part in parts)
        return tuple(str(part).strip() for part in parts) if listed else _bad(key, value, list)
    if not isinstance(value, str | int | float | datetime.date):  # YAML reads 2024-01-01 as a date
        return _bad(key, value, kind, words)
    if kind is bool:
        return _as_bool(key, value)
    if isinstance(value, bool) and kind is not str:
        return _bad(key, value, kind, words)
    try:
        number = kind(value)
        exact = kind is str or (math.isfinite(number) and number == float(typing.cast(Any, value)))
    except (TypeError, ValueError, OverflowError):
        return _bad(key, value, kind, words)
    return number if exact else _bad(key, value, kind, words)


def is_none(value: Any) -> bool:
    """Whether a setting is none, also as a text of the command line."""
    return value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))


def _as_bool(key: str, value: Any) -> bool:
    texts = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return texts[str(value).lower()] if str(value).lower() in texts else _bad(key, value, bool)


def _bad(key: str, value: Any, kind: Any, words: Iterable[str] = ()) -> Any:
    name = getattr(kind, "__name__", str(kind))
    raise ConfigError(f"{key} = {shown(value)} is no {name}{''.join(f', nor {word}' for word in words)}.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file: a mapping whose keys are texts.

    Raises:
        ConfigError: No such file, not a mapping, or larger or deeper than any file of settings is.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {str(path)!r}.")
    with refusing(ConfigError, repr(str(path))):
        values = parse_yaml(read_text(path))
        if not isinstance(values, dict):
            raise Malformed(f"it must hold a mapping of settings (lr: 0.001), not a {type(values).__name__}")
        for key in values:
            if not isinstance(key, str):
                raise Malformed(f"the setting {shown(key)} must have a text as its name")
    return values


MOST_YAML = 2**20
"""The longest YAML text that is read, in bytes."""
_MOST_MERGED = 10_000


def parse_yaml(text: str) -> Any:
    """The value of a YAML text whose size and depth are bounded, also after aliases and merge keys are resolved.

    Raises:
        Malformed: It is no YAML, or larger or deeper than any text of settings is.

    Example:
        >>> parse_yaml("lr: 0.001")
        {'lr': 0.001}
    """
    yaml = need("yaml", "cli")
    if len(text) > MOST_YAML:
        raise Malformed(f"it has {len(text):,} characters of YAML; at most {MOST_YAML:,} are read")

    plain: Any = yaml.SafeLoader

    class Loader(plain):
        """Stops at what would take long: deep nesting, and merge keys (``<<``), which can multiply level by level."""

        def fetch_flow_collection_start(self, kind: Any) -> None:
            if self.flow_level >= DEEPEST:
                raise yaml.YAMLError(f"it is nested deeper than {DEEPEST} levels")
            super().fetch_flow_collection_start(kind)

        def flatten_mapping(self, node: Any) -> None:
            held = 0
            for key, value in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        if isinstance(part, yaml.MappingNode):
                            self.flatten_mapping(part)
                            held += len(part.value)
                        if held > _MOST_MERGED:
                            raise yaml.YAMLError(f"its merge keys bring in more than {_MOST_MERGED:,} entries")
            super().flatten_mapping(node)

    try:
        return bounded(yaml.load(text, Loader))
    except Malformed:
        raise
    except RecursionError as error:
        raise Malformed("it is nested too deeply") from error
    except Exception as error:  # of the library, of many classes, and always of the text
        raise Malformed(f"it is no valid YAML: {error}") from error


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
