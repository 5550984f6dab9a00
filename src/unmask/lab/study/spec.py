"""What a sweep is: a frozen value, read from YAML and checked where it enters. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

from unmask.errors import ConfigError
from unmask.lab.training.settings import read_yaml
from unmask.reading import count, fields, finite, items, one_of, optional, refusing, scalar, shown, text

Settings = Mapping[str, Any]
Grid = Mapping[str, tuple[Any, ...]]
MOST_CELLS = 100_000
"""The most cells of a sweep."""


@dataclass(frozen=True)
class Row:
    """A method of the sweep: a row of its tables.

    Attributes:
        name: Its name in tables; also what rules and filters call it.
        settings: Of `unmask.lab.training.config.TrainConfig`, over those of the sweep, the rules and the axes.
        grid: Settings with several values, tried one by one: ``{"lr": (1e-4, 3e-4)}``.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    grid: Grid = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """Settings for some of the runs only.

    Attributes:
        when: Axes (or ``method``) and the values, as text, for which it holds.
        settings: Over those of the sweep; an axis or a row goes over them.
        grid: In place of the row's own.
    """

    when: Mapping[str, tuple[str, ...]]
    settings: Settings = field(default_factory=dict)
    grid: Grid = field(default_factory=dict)

    def holds(self, labels: Mapping[str, Any]) -> bool:
        """Whether a run with these labels is meant."""
        return all(str(labels.get(key)) in values for key, values in self.when.items())


@dataclass(frozen=True)
class Choice:
    """A setting that is chosen per row, task and so on, on some seeds; the other seeds run at the chosen value alone.

    Attributes:
        setting: A setting of the grids.
        seeds: Where it is chosen; the values are compared by the mean over these.
        by: ``"loss"`` (lowest) or a metric's name (highest) on the evaluation split; ``"score"`` is the task's main metric.
        report: ``"all"`` seeds, or the ``"others"`` than those.
    """

    setting: str = "lr"
    seeds: tuple[int, ...] = (0,)
    by: str = "loss"
    report: Literal["all", "others"] = "all"

    def __post_init__(self) -> None:
        form = {"setting": text, "seeds": items(scalar), "by": text, "report": one_of("all", "others")}
        with refusing(ConfigError, "choose"):
            fields(form)(vars(self), "choose")
        if not self.seeds:
            raise ConfigError("choose.seeds is empty; give the seeds to choose on.")


@dataclass(frozen=True)
class Protocol:
    """How the runs of a cell become one figure.

    Attributes:
        kind: ``"seeds"``: the mean over all seeds, with a confidence interval. ``"paper"``: mean and deviation of the best
            ``best`` runs. ``"both"``: the runs that each of the two needs are made, and both figures are shown.
        interval: ``"t"`` or ``"bootstrap"``.
        level: The interval's level.
        best: How many runs count under ``"paper"``.
        pair: A setting of the grids, such as ``"lr"``: under ``"paper"`` its i-th value is run with the i-th seed alone, and
            these are the runs of a cell. None: every value with every seed.
        score: What is reported: ``"score"``, the task's main metric on its first evaluation split, or a metric by its name after
            training (``test_f1``: another split than the one that the choice is made on).
    """

    kind: Literal["seeds", "paper", "both"] = "seeds"
    interval: Literal["t", "bootstrap"] = "t"
    level: float = 0.95
    best: int = 3
    pair: str | None = None
    score: str = "score"

    def __post_init__(self) -> None:
        form = {
            "kind": one_of("seeds", "paper", "both"),
            "interval": one_of("t", "bootstrap"),
            "level": finite,
            "best": count,
            "pair": optional(text),
            "score": text,
        }
        with refusing(ConfigError, "protocol"):
            fields(form)(vars(self), "protocol")
        if not 0 < self.level < 1 or self.best < 1:
            raise ConfigError(
                f"protocol.level = {self.level} must lie between 0 and 1, and protocol.best = {self.best} be at least 1."
            )


@dataclass(frozen=True)
class Claim:
    """One row of a published table.

    Attributes:
        method: The row of the sweep that it stands next to.
        budget: The value of the axis ``budget`` that it stands next to, as text; None for a row without one.
        count: The budget as it is printed.
        scores: The text of each column as it is printed, in percent: the mean, and after a space the deviation if there is one.
        average: The average as it is printed; None where there is none.
    """

    method: str
    budget: str | None
    count: str
    scores: Mapping[str, str]
    average: str | None = None

    @property
    def mean(self) -> float:
        """The mean of the printed columns."""
        return fmean(float(text.split()[0]) for text in self.scores.values())


@dataclass(frozen=True)
class Claims:
    """A published table: what it was measured on, and its rows."""

    model: str
    rows: tuple[Claim, ...]

    def of(self, labels: Mapping[str, Any]) -> Claim | None:
        """The row that stands next to a line with these labels; None if there is none."""
        method, budget = labels.get("method"), labels.get("budget")
        return next((r for r in self.rows if r.method == method and r.budget in (None, budget)), None)


@dataclass(frozen=True)
class Sweep:
    """A grid of runs.

    Attributes:
        name: Of the sweep.
        settings: Of every run; see `unmask.lab.training.config.TrainConfig`.
        axes: Settings and their values; every combination is run.
        rows: The methods.
        rules: For some runs only; a later one goes over an earlier one.
        order: Nesting, outermost first, of the axes, ``method`` and ``grid``.
        choice: None to run every value of every grid with every seed.
        protocol: See there.
        title: For people.
        notes: What a reader must know, paragraph by paragraph.
        figures: Figures that the report draws.
        claims: The figures that the paper prints for this table; None for none.
    """

    name: str
    settings: Settings
    axes: Grid
    rows: tuple[Row, ...]
    rules: tuple[Rule, ...] = ()
    order: tuple[str, ...] = ()
    choice: Choice | None = None
    protocol: Protocol = field(default_factory=Protocol)
    title: str = ""
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    claims: Claims | None = None

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError(
                "a sweep needs methods: at least one row, such as methods: {id3: {settings: {method: id3}}}."
            )
        grids = [math.prod(len(values) for values in row.grid.values()) for row in self.rows]
        most = math.prod(len(values) for values in self.axes.values()) * sum(grids)
        if most > MOST_CELLS:
            raise ConfigError(f"the sweep has {most:,} cells; at most {MOST_CELLS:,} are laid out. Give fewer values.")
        names = {*self.axes, "method", "grid"}
        for key in self.order:
            if key not in names:
                raise ConfigError(f"order names {key!r}; it can hold {', '.join(sorted(names))}.")
        for rule in self.rules:
            for key in rule.when:
                if key not in names - {"grid"}:
                    raise ConfigError(f"a rule asks for {key!r}; it can ask for {', '.join(sorted(names - {'grid'}))}.")
        if self.choice and "seed" not in self.axes:
            raise ConfigError("choose needs an axis seed, to tell where the choice is made from where it is reported.")
        if self.choice and not set(map(str, self.choice.seeds)) & set(map(str, self.axes["seed"])):
            raise ConfigError(
                f"choose.seeds = {list(self.choice.seeds)}; they must be among the seeds {list(self.axes['seed'])}."
            )

    @property
    def nesting(self) -> tuple[str, ...]:
        """The whole order: what ``order`` leaves out comes after it; without any, seeds are outermost."""
        rest = [*(("seed",) if "seed" in self.axes else ()), *self.axes, "method", "grid"]
        return tuple(dict.fromkeys((*self.order, *rest)))

    def with_settings(self, settings: Settings) -> Sweep:
        """A copy with settings that every run has; an axis of that name is gone, and rows and rules do not set it."""
        given = set(settings)
        return replace(
            self,
            settings={**self.settings, **settings},
            axes=_without(self.axes, given),
            rows=tuple(
                replace(r, settings=_without(r.settings, given), grid=_without(r.grid, given)) for r in self.rows
            ),
            rules=tuple(
                Rule(_without(r.when, given), _without(r.settings, given), _without(r.grid, given))
                for r in self.rules
                if replace(r, when={k: v for k, v in r.when.items() if k in given}).holds(settings)
            ),
            order=tuple(key for key in self.order if key not in given),
        )

    def with_axis(self, axis: str, values: Sequence[Any]) -> Sweep:
        """A copy with other values on an axis, or an axis more."""
        choice = self.choice
        if axis == "seed" and choice and not set(map(str, choice.seeds)) & set(map(str, values)):
            try:
                choice = replace(choice, seeds=(int(values[0]),))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"seed {shown(values[0])} is no whole number.") from error
        return replace(self, axes={**self.axes, axis: tuple(values)}, choice=choice)

    def only(self, wanted: Mapping[str, Sequence[str]]) -> Sweep:
        """A copy with some of the rows and some values of the axes.

        Args:
            wanted: Axis or ``method`` -> values, as text.

        Raises:
            ConfigError: No such axis, value or row.
        """
        sweep = self
        for key, values in wanted.items():
            have = {r.name: r for r in self.rows} if key == "method" else {str(v): v for v in self.axes.get(key, ())}
            unknown = [value for value in values if value not in have]
            if unknown:
                raise ConfigError(f"{key} {unknown[0]!r} is not in this sweep; there are {', '.join(have) or 'none'}.")
            kept = tuple(have[value] for value in dict.fromkeys(values))
            sweep = replace(sweep, rows=cast(Any, kept)) if key == "method" else sweep.with_axis(key, kept)
        return sweep


def _without(settings: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def read_sweep(path: str | Path) -> Sweep:
    """Reads a sweep from a YAML file; see docs/reproduce.md.

    Raises:
        ConfigError: No such file, or not a sweep.
    """
    values = read_yaml(path)
    return parse({"name": Path(path).stem, **values})


def parse(values: Mapping[str, Any]) -> Sweep:
    """A sweep from plain values.

    Raises:
        ConfigError: An unknown key, or a value of the wrong form.

    Example:
        >>> sweep = parse({"name": "s", "axes": {"seed": [0, 1]}, "methods": {"full": {"settings": {"method": "full"}}}})
        >>> sweep.nesting
        ('seed', 'method', 'grid')
    """
    allowed = (
        "name",
        "title",
        "notes",
        "settings",
        "axes",
        "methods",
        "rules",
        "order",
        "choose",
        "protocol",
        "figures",
    )
    _known("sweep", values, (*allowed, "claims"))
    return Sweep(
        name=str(values.get("name", "sweep")),
        title=str(values.get("title", "")),
        notes=_texts("notes", values.get("notes", ())),
        settings=_mapping("settings", values.get("settings")),
        axes=_grid("axes", values.get("axes")),
        rows=tuple(_row(str(name), row) for name, row in _mapping("methods", values.get("methods")).items()),
        rules=tuple(_rule(rule) for rule in _listed("rules", values.get("rules"))),
        order=_texts("order", values.get("order", ())),
        choice=read_choice(values.get("choose")),
        protocol=read_protocol(values.get("protocol")),
        figures=_texts("figures", values.get("figures", ())),
        claims=read_claims(values.get("claims")),
    )


def _row(name: str, values: Any) -> Row:
    values = _mapping(f"method {name!r}", values)
    _known(f"method {name!r}", values, ("settings", "grid"))
    return Row(name, _mapping("settings", values.get("settings")), _grid("grid", values.get("grid")))


def _rule(values: Any) -> Rule:
    values = _mapping("a rule", values)
    _known("a rule", values, ("when", "settings", "grid"))
    when = {
        k: tuple(map(str, v if isinstance(v, list) else [v])) for k, v in _mapping("when", values.get("when")).items()
    }
    return Rule(when, _mapping("settings", values.get("settings")), _grid("grid", values.get("grid")))


def read_choice(values: Any) -> Choice | None:
    """How a setting is chosen, from plain values; None for none.

    Raises:
        ConfigError: An unknown key, or a value that cannot work.
    """
    if values is None:
        return None
    values = _mapping("choose", values)
    _known("choose", values, ("setting", "seeds", "by", "report"))
    return Choice(**{**values, "seeds": tuple(_listed("choose.seeds", values.get("seeds", (0,))))})


def read_protocol(values: Any) -> Protocol:
    """A protocol from plain values.

    Raises:
        ConfigError: An unknown key, or a value that cannot work.
    """
    values = _mapping("protocol", values)
    _known("protocol", values, ("kind", "interval", "level", "best", "pair", "score"))
    return Protocol(**values)


def read_claims(values: Any) -> Claims | None:
    """The figures of a published table from plain values; None for none.

    Raises:
        ConfigError: An unknown key, or a score that is no number.
    """
    if not values:
        return None
    values = _mapping("claims", values)
    _known("claims", values, ("model", "rows"))
    return Claims(str(values.get("model", "")), tuple(map(_claim, _listed("claims.rows", values.get("rows")))))


def _claim(values: Any) -> Claim:
    values = _mapping("a row of claims", values)
    _known("a row of claims", values, ("method", "budget", "count", "scores", "average"))
    texts = {str(column): str(score) for column, score in _mapping("scores", values.get("scores")).items()}
    budget, average = (None if values.get(key) is None else str(values[key]) for key in ("budget", "average"))
    for printed in [*texts.values(), *([average] if average else [])]:
        if not _PRINTED.fullmatch(printed):
            raise ConfigError(
                f"claims: {printed!r} of {values.get('method')!r} must be a printed mean ('89.38'), with its deviation if "
                "there is one ('89.38 0.07')."
            )
    if average is not None and (not texts or " " in average):
        raise ConfigError(f"claims: the average {average!r} must be a printed mean, of at least one score.")
    return Claim(str(values.get("method", "")), budget, str(values.get("count", "")), texts, average)


_PRINTED = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?(?: [0-9]{1,9}(?:\.[0-9]{1,9})?)?")


def _known(where: str, values: Mapping[str, Any], allowed: Sequence[str]) -> None:
    unknown = sorted(set(map(str, values)) - set(allowed))
    if unknown:
        raise ConfigError(f"{where} has an unknown key {unknown[0]!r}; there are {', '.join(allowed)}.")


def _mapping(where: str, values: Any) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping (key: value), not {shown(values)}.")
    return {str(key): value for key, value in values.items()}


def _listed(where: str, values: Any) -> Sequence[Any]:
    if values is None:
        return ()
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{where} must be a list, not {shown(values)}.")
    return values


def _grid(where: str, values: Any) -> dict[str, tuple[Any, ...]]:
    grid = _mapping(where, values)
    for key, options in grid.items():
        if not isinstance(options, list) or not options:
            raise ConfigError(f"{where}.{key} must be a list of at least one value, not {shown(options)}.")
    return {str(key): tuple(options) for key, options in grid.items()}


def _texts(where: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"{where} must be a list, not {shown(values)}.")
    return tuple(map(str, values))
