"""The description of a sweep: frozen values that are read from YAML and checked. It imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal, cast

from unmask.errors import ConfigError
from unmask.reading import choices, count, fields, finite, items, one_of, optional, refusing, scalar, shown, text

Settings = Mapping[str, Any]
Grid = Mapping[str, tuple[Any, ...]]
MOST_CELLS = 100_000
"""A sweep has at most so many cells."""


@dataclass(frozen=True)
class Row:
    """A method of the sweep, which is a row of its tables.

    Attributes:
        name: The name in tables, rules and filters.
        settings: Settings of `unmask.lab.training.config.TrainConfig`. They override those of the sweep, the rules and
            the axes.
        grid: Settings with several values, each of which is tried: ``{"lr": (1e-4, 3e-4)}``.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    grid: Grid = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """Settings for some of the runs only.

    Attributes:
        when: The axes (or ``method``) and their values, as text, for which the rule holds.
        settings: Settings that override those of the sweep. An axis or a row overrides them.
        grid: A grid that replaces the row's own.
    """

    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    grid: Grid = field(default_factory=dict)

    def holds(self, labels: Mapping[str, Any]) -> bool:
        """Returns True if the rule holds for a run with these labels."""
        return all(str(labels.get(key)) in values for key, values in self.when.items())


@dataclass(frozen=True)
class Choice:
    """The choice of a setting's value on some seeds. The other seeds run at the chosen value alone.

    The value is chosen for each combination of the other labels (method, task and so on).

    Attributes:
        setting: A setting of the grids.
        seeds: The seeds on which the value is chosen; the values are compared by their means over these seeds.
        by: ``"loss"`` (lowest) or a metric's name (highest) on the evaluation split; ``"score"`` is the task's main
            metric.
        report: The seeds whose runs count: ``"all"``, or ``"others"`` than those of the choice.
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
    """The rule by which the runs of a table's cell become one figure.

    Attributes:
        kind: ``"seeds"``: the mean over all seeds, with a confidence interval. ``"paper"``: mean and deviation of the
            best ``best`` runs. ``"both"``: the runs that each of the two needs are made, and both figures are shown.
        interval: The kind of the interval, ``"t"`` or ``"bootstrap"``.
        level: The level of the interval.
        best: How many runs count under ``"paper"``.
        pair: A setting of the grids, such as ``"lr"``. Under ``"paper"`` its i-th value is run with the i-th seed
            alone, and these are the runs of a cell. With None every value is run with every seed.
        score: The figure that is reported: ``"score"``, the task's main metric on its first evaluation split, or the
            name of a metric after training (``test_f1``: a metric on another split than the one of the choice).
    """

    kind: Literal["seeds", "paper", "both"] = "seeds"
    interval: Literal["t", "bootstrap"] = "t"
    level: float = 0.95
    best: int = 3
    pair: str | None = None
    score: str = "score"

    @property
    def paired(self) -> str | None:
        """The paired setting; None under ``"seeds"``, where no runs are paired."""
        return None if self.kind == "seeds" else self.pair

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
                f"protocol.level = {self.level} must lie between 0 and 1, and protocol.best = {self.best} must be "
                "at least 1."
            )


@dataclass(frozen=True)
class Claim:
    """The figures of one row of a published table.

    Attributes:
        method: The row of the sweep that the claim stands next to.
        budget: The value of the axis ``budget`` that the claim stands next to, as text; None for a row without a
            budget.
        count: The budget as it is printed.
        scores: The text of each column as it is printed, in percent: the mean, and after a space the deviation if
            there is one.
        average: The average as it is printed; None if none is printed.
    """

    method: str = ""
    budget: str | None = None
    count: str = ""
    scores: Mapping[str, str] = field(default_factory=dict)
    average: str | None = None

    @property
    def mean(self) -> float:
        """The mean of the printed columns."""
        return fmean(float(text.split()[0]) for text in self.scores.values())


@dataclass(frozen=True)
class Claims:
    """The model on which a published table was measured, and the rows of the table."""

    model: str = ""
    rows: tuple[Claim, ...] = ()

    def of(self, labels: Mapping[str, Any]) -> Claim | None:
        """Returns the row that stands next to a line with these labels; None if there is none."""
        method, budget = labels.get("method"), labels.get("budget")
        return next((r for r in self.rows if r.method == method and r.budget in (None, budget)), None)


@dataclass(frozen=True)
class Sweep:
    """The description of a grid of runs.

    Attributes:
        name: The sweep's name.
        settings: The settings of every run; see `unmask.lab.training.config.TrainConfig`.
        axes: Settings and their values; every combination is run.
        rows: The methods.
        rules: Settings for some runs only; a later rule overrides an earlier one.
        order: The nesting of the axes, ``method`` and ``grid``, outermost first.
        choice: How a setting is chosen; None to run every value of every grid with every seed.
        protocol: How the runs of a cell become one figure.
        title: The title of tables and of the report.
        notes: Paragraphs that a reader of the tables must know.
        figures: The figures that the report draws.
        claims: The figures that the paper prints for this table; None if there are none.
    """

    name: str = "sweep"
    settings: Settings = field(default_factory=dict)
    axes: Grid = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
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
            raise ConfigError(f"the sweep has {most:,} cells; at most {MOST_CELLS:,} are allowed. Give fewer values.")
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
        """The complete nesting: what ``order`` leaves out comes after it, first the seeds, then the other axes."""
        rest = [*(("seed",) if "seed" in self.axes else ()), *self.axes, "method", "grid"]
        return tuple(dict.fromkeys((*self.order, *rest)))

    def with_settings(self, settings: Settings) -> Sweep:
        """Returns a copy whose runs all have these settings: they leave the axes, and no row or rule sets them."""
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
        """Returns a copy with other values on an axis, or with one more axis."""
        choice = self.choice
        if axis == "seed" and choice and not set(map(str, choice.seeds)) & set(map(str, values)):
            try:
                choice = replace(choice, seeds=(int(values[0]),))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"seed {shown(values[0])} is not a whole number; give seeds such as 0,1,2."
                ) from error
        return replace(self, axes={**self.axes, axis: tuple(values)}, choice=choice)

    def only(self, wanted: Mapping[str, Sequence[str]]) -> Sweep:
        """Returns a copy with some of the rows and some values of the axes.

        Args:
            wanted: Axis or ``method`` -> values, as text.

        Raises:
            ConfigError: There is no such axis, value or row.
        """
        sweep = self
        for key, values in wanted.items():
            have = {r.name: r for r in self.rows} if key == "method" else {str(v): v for v in self.axes.get(key, ())}
            unknown = [value for value in values if value not in have]
            if unknown:
                raise ConfigError(
                    f"{key} {unknown[0]!r} is not in this sweep; there are {choices(unknown[0], have) or 'none'}."
                )
            kept = tuple(have[value] for value in dict.fromkeys(values))
            sweep = replace(sweep, rows=cast(Any, kept)) if key == "method" else sweep.with_axis(key, kept)
        return sweep


def _without(settings: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}
