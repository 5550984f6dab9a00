"""Makes a `Sweep` from a YAML file or from plain values, and refuses what is none. It imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.lab.study.spec import Choice, Claim, Claims, Protocol, Row, Rule, Sweep
from unmask.lab.training.settings import read_yaml
from unmask.reading import Form, choices, plain, shown


def read_sweep(path: str | Path) -> Sweep:
    """Reads a sweep from a YAML file; see docs/reproduce.md.

    Raises:
        ConfigError: There is no such file, or it holds no sweep.
    """
    values = read_yaml(path)
    return parse({"name": Path(path).stem, **values})


def parse(values: Mapping[str, Any]) -> Sweep:
    """Makes a sweep from plain values.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong form.

    Example:
        >>> sweep = parse({"axes": {"seed": [0, 1]}, "methods": {"full": {"settings": {"method": "full"}}}})
        >>> sweep.nesting
        ('seed', 'method', 'grid')
    """
    found = _entries(values, "sweep", _SWEEP)
    return Sweep(rows=found.pop("methods", ()), choice=found.pop("choose", None), **found)


def read_choice(values: Any, where: str = "choose") -> Choice | None:
    """Makes a `Choice` from plain values; None stays None. It raises what `parse` raises."""
    return None if values is None else Choice(**_entries(values, where, _CHOICE))


def read_protocol(values: Any, where: str = "protocol") -> Protocol:
    """Makes a `Protocol` from plain values. It raises what `parse` raises."""
    return Protocol(**_entries(values, where, _PROTOCOL))


def read_claims(values: Any, where: str = "claims") -> Claims | None:
    """Makes `Claims` from plain values; None if there are none. It raises what `parse` raises."""
    return Claims(**_entries(values, where, _CLAIMS)) if values else None


Forms = Mapping[str, Form]
"""The keys that a mapping may have, and the form of each. A form here converts a value, or raises ConfigError."""


def _entries(values: Any, where: str, known: Forms) -> dict[str, Any]:
    """Returns the entries of a mapping that are not null; it refuses keys that are not known."""
    given = _mapping(values, where)
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ConfigError(f"{where} has an unknown key {unknown[0]!r}; there are {choices(unknown[0], known)}.")
    inside = "" if where == "sweep" else f"{where}."
    return {key: form(given[key], f"{inside}{key}") for key, form in known.items() if given.get(key) is not None}


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping (key: value), not {shown(value)}.")
    return {str(key): each for key, each in value.items()}


def _list(value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} must be a list, not {shown(value)}.")
    return tuple(value)


def _word(value: Any, where: str) -> str:
    return str(value)


def _words(value: Any, where: str) -> tuple[str, ...]:
    return tuple(map(str, _list(value, where)))


def _grid(value: Any, where: str) -> dict[str, tuple[Any, ...]]:
    grid = _mapping(value, where)
    for key, options in grid.items():
        if not isinstance(options, list) or not options:
            raise ConfigError(f"{where}.{key} must be a list of at least one value, not {shown(options)}.")
    return {key: tuple(options) for key, options in grid.items()}


def _when(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    given = _mapping(value, where)
    return {key: _words(each if isinstance(each, list) else [each], where) for key, each in given.items()}


def _rows(value: Any, where: str) -> tuple[Row, ...]:
    methods = _mapping(value, where)
    return tuple(Row(name, **_entries(row, f"method {name!r}", _ROW)) for name, row in methods.items())


def _rules(value: Any, where: str) -> tuple[Rule, ...]:
    return tuple(Rule(**_entries(rule, "a rule", _RULE)) for rule in _list(value, where))


def _claim_rows(value: Any, where: str) -> tuple[Claim, ...]:
    claims = tuple(Claim(**_entries(row, "a row of claims", _CLAIM)) for row in _list(value, where))
    for claim in claims:
        for printed in [*claim.scores.values(), *([claim.average] if claim.average else [])]:
            if not _PRINTED.fullmatch(printed):
                raise ConfigError(
                    f"claims: {printed!r} of {claim.method!r} must be a printed mean ('89.38'), with its deviation if "
                    "there is one ('89.38 0.07')."
                )
        if claim.average is not None and (not claim.scores or " " in claim.average):
            raise ConfigError(f"claims: the average {claim.average!r} must be a printed mean, of at least one score.")
    return claims


def _scores(value: Any, where: str) -> dict[str, str]:
    return {column: str(score) for column, score in _mapping(value, where).items()}


_PRINTED = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?(?: [0-9]{1,9}(?:\.[0-9]{1,9})?)?")
_ROW: Forms = {"settings": _mapping, "grid": _grid}
_RULE: Forms = {"when": _when, **_ROW}
_CHOICE: Forms = {each.name: _list if each.name == "seeds" else plain for each in fields(Choice)}
_PROTOCOL: Forms = {each.name: plain for each in fields(Protocol)}
_CLAIM: Forms = {"method": _word, "budget": _word, "count": _word, "scores": _scores, "average": _word}
_CLAIMS: Forms = {"model": _word, "rows": _claim_rows}
_SWEEP: Forms = {
    "name": _word,
    "title": _word,
    "notes": _words,
    "settings": _mapping,
    "axes": _grid,
    "methods": _rows,
    "rules": _rules,
    "order": _words,
    "choose": read_choice,
    "protocol": read_protocol,
    "figures": _words,
    "claims": read_claims,
}
