"""Reads from a settings class what each setting may be, and converts and checks values by it."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unmask.errors import ConfigError
from unmask.reading import choices, shown


def setting(default: Any, text: str) -> Any:
    """Returns a dataclass field with a default and a help text. The command line and docs/cli.md show the text."""
    return dataclasses.field(default=default, metadata={"help": text})


def required(text: str) -> Any:
    """Returns a dataclass field that must be given, with a help text."""
    return dataclasses.field(metadata={"help": text})


@dataclass(frozen=True)
class Setting:
    """The values that one setting may have: those of ``types``, the ``words`` of ``Literal`` types, and None if ``optional``.

    A type is ``bool``, ``int``, ``float``, ``str`` or ``tuple`` (a tuple of texts). The default is ``dataclasses.MISSING`` if
    the setting must be given.
    """

    name: str
    types: tuple[type, ...]
    words: tuple[str, ...]
    optional: bool
    default: Any
    help: str

    def convert(self, value: Any) -> Any:
        """Returns the setting's value from a plain value: one of a YAML file, or a text of the command line.

        Raises:
            ConfigError: The value cannot be converted without loss.
        """
        if is_none(value):
            if self.optional:
                return None
            return () if self.types == (tuple,) else self._refuse(value)
        if not self.types or (isinstance(value, str) and value in self.words):
            return value  # `check` compares it with the words
        kind = self.types[0]
        if kind is tuple:
            parts = value.split(",") if isinstance(value, str) else value
            if not isinstance(parts, list | tuple) or not all(isinstance(part, str | int | float) for part in parts):
                self._refuse(value, "list")
            return tuple(str(part).strip() for part in parts)
        if not isinstance(value, str | int | float | datetime.date):  # YAML reads 2024-01-01 as a date
            self._refuse(value)
        if kind is bool:
            texts = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            return texts[str(value).lower()] if str(value).lower() in texts else self._refuse(value)
        if isinstance(value, bool) and kind is not str:
            self._refuse(value)
        try:
            number = kind(value)
            exact = kind is str or (math.isfinite(number) and number == float(typing.cast(Any, value)))
        except (TypeError, ValueError, OverflowError):
            self._refuse(value)
        return number if exact else self._refuse(value)

    def check(self, value: Any) -> None:
        """Refuses a value of another type, a word that is not known, and a number that is not finite or too large.

        Raises:
            ConfigError: The value is refused.
        """
        if (value is None and self.optional) or (isinstance(value, str) and value in self.words):
            return
        if not self.types:
            raise ConfigError(f"{self.name} = {shown(value)}; it must be one of {choices(value, self.words)}.")
        if not any(_has_type(value, kind) for kind in self.types):
            allowed = [kind.__name__ for kind in self.types] + list(self.words) + ["none"] * self.optional
            raise ConfigError(f"{self.name} = {shown(value)}; it must be {' or '.join(allowed)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.name} = {value}; it must be finite.")
        if isinstance(value, int) and abs(value) >= 2**31 and self.name != "seed":
            raise ConfigError(f"{self.name} = {shown(value)}; it must be below {2**31:,}.")

    def _refuse(self, value: Any, kind: str | None = None) -> typing.NoReturn:
        kind = kind or (self.types[0].__name__ if self.types else " or ".join(self.words))
        words = "".join(f", nor {word}" for word in self.words if self.types)
        raise ConfigError(f"{self.name} = {shown(value)} is no {kind}{words}.")


def is_none(value: Any) -> bool:
    """Returns True for None and for the texts that stand for it: none, null and the empty text."""
    return value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))


def _has_type(value: Any, kind: type) -> bool:
    """Returns True if a value has a type; a whole number is a float too, and a bool is not a number."""
    if kind is tuple:
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


@functools.cache
def settings_of(cls: type) -> Mapping[str, Setting]:
    """Returns the settings of a dataclass by their names.

    Example:
        >>> from unmask.lab.training.config import TrainConfig
        >>> settings_of(TrainConfig)["leaving"].words
        ('restored', 'kept')
    """
    hints, found = typing.get_type_hints(cls), {}
    for each in dataclasses.fields(cls):
        hint = hints[each.name]
        options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        literals = [option for option in options if typing.get_origin(option) is Literal]
        kinds = [option for option in options if option is not type(None) and option not in literals]
        found[each.name] = Setting(
            each.name,
            tuple(typing.get_origin(kind) or kind for kind in kinds),
            tuple(word for literal in literals for word in typing.get_args(literal)),
            type(None) in options,
            each.default,
            each.metadata.get("help", ""),
        )
    return types.MappingProxyType(found)


def converted(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts plain values to those of a settings class.

    Raises:
        ConfigError: A setting is not known, a required one is missing, or a value cannot be converted.

    Example:
        >>> from unmask.lab.training.config import TrainConfig
        >>> converted(TrainConfig, {"model": "m", "output": "o", "lr": "3e-4", "include": "query,value"})["include"]
        ('query', 'value')
    """
    known = settings_of(cls)
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError(f"unknown setting {shown(unknown[0])}; there are {choices(unknown[0], sorted(known))}.")
    missing = [each.name for each in known.values() if each.default is dataclasses.MISSING]
    absent = sorted(set(missing) - {key for key, value in values.items() if value is not None})
    if absent:
        raise ConfigError(f"{' and '.join(absent)} must be given.")
    return {key: known[key].convert(value) for key, value in values.items()}
