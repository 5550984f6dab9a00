"""A sweep's tables: rows of methods, columns of tasks, each cell by both protocols. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from unmask.sweeps.cells import Cell, runs
from unmask.sweeps.choosing import Chosen, choose, choosing
from unmask.sweeps.protocols import Estimate, best_of, interval
from unmask.sweeps.records import trained_weights
from unmask.sweeps.spec import Choice, Protocol
from unmask.sweeps.store import Result

EDGES = {"low": "the lowest value tried", "high": "the highest value tried"}


@dataclass(frozen=True)
class Entry:
    """One cell of a table.

    Attributes:
        seeds: Mean over the seeds, with an interval; None while no run is done.
        best: The paper's protocol over the same runs.
        value: The chosen value of the swept setting (the learning rate); None without a choice.
        edge: See `unmask.sweeps.choosing.Chosen`.
        tried: What each value was chosen by.
        metric: Of the scores.
        trained: Weights that count; None while no run is done.
        scores: By seed.
        runs: Ids.
        failed: How many of its runs failed.
        missing: How many of its runs have not ended.
    """

    seeds: Estimate | None
    best: Estimate | None
    value: Any = None
    edge: str | None = None
    tried: Mapping[str, float] = field(default_factory=dict)
    metric: str = "score"
    trained: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    runs: tuple[str, ...] = ()
    failed: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        labels: ``method``, and the axes other than task and seed.
        entries: By task.
        average: Of the tasks' means; None where one is missing.
    """

    labels: Mapping[str, str]
    entries: Mapping[str, Entry]
    average: float | None


@dataclass(frozen=True)
class Table:
    """A sweep's table.

    Attributes:
        tasks: Columns.
        lines: Rows, in the order of the cells.
        protocol: Which of an entry's figures is the sweep's own.
        choice: How the swept setting was chosen.
    """

    tasks: tuple[str, ...]
    lines: tuple[Line, ...]
    protocol: Protocol
    choice: Choice | None


def table(
    cells: Sequence[Cell], results: Mapping[str, Result], protocol: Protocol, choice: Choice | None = None
) -> Table:
    """The table of a grid, as far as it has been run.

    Args:
        cells: The full grid.
        results: By run id.
        protocol: Of the sweep.
        choice: Of the sweep.
    """
    chosen = choose(cells, choice, results) if choice else {}
    swept = choice.setting if choice else ""
    rows: dict[tuple[tuple[str, str], ...], dict[str, list[Cell]]] = {}
    for cell in cells:
        labels = tuple(
            (k, str(v)) for k, v in cell.labels.items() if k not in ("task", "seed", swept) and v is not None
        )
        rows.setdefault(labels, {}).setdefault(task_of(cell), []).append(cell)
    tasks = tuple(dict.fromkeys(task_of(cell) for cell in cells))
    lines = []
    for labels, by_task in rows.items():
        entries = {task: _entry(members, results, protocol, choice, chosen) for task, members in by_task.items()}
        lines.append(Line(dict(labels), entries, _average([entries.get(task) for task in tasks], protocol)))
    return Table(tasks, tuple(lines), protocol, choice)


def task_of(cell: Cell) -> str:
    """The task's name; ``"data"`` for the user's own files."""
    return str(cell.settings.get("task") or "data")


def figure(entry: Entry, protocol: Protocol) -> Estimate | None:
    """The figure of a cell under a protocol."""
    return entry.best if protocol.kind == "paper" else entry.seeds


def _entry(
    members: list[Cell],
    results: Mapping[str, Result],
    protocol: Protocol,
    choice: Choice | None,
    chosen: Mapping[Any, Chosen],
) -> Entry:
    pick = chosen.get(members[0].group(choice.setting, "seed")) if choice else None
    if choice and pick:
        if pick.final and pick.value is None:  # no value of the grid has a run that is done
            return Entry(None, None, failed=len(runs(c for c in members if choosing(c, choice))))
        members = [c for c in members if str(c.labels.get(choice.setting)) == str(pick.value)]
        others = [c for c in members if not choosing(c, choice)]
        members = others if choice.report == "others" and others else members
    unique = runs(members)
    ended = [(cell, results[cell.id]) for cell in unique if cell.id in results]
    found = [(cell, result, reported(result, protocol)) for cell, result in ended]
    done = [(cell, result, score) for cell, result, score in found if score is not None]
    by_seed = {str(cell.settings.get("seed", 0)): score for cell, _, score in done}
    scores, first = list(by_seed.values()), done[0][1] if done else {}
    summary = first.get("summary") or {}
    return Entry(
        seeds=interval(scores, protocol.level, protocol.interval) if scores else None,
        best=best_of(scores, protocol.best) if scores else None,
        value=pick.value if pick else None,
        edge=pick.edge if pick else None,
        tried=pick.tried if pick else {},
        metric=str(first.get("metric", "score")) if protocol.score == "score" else protocol.score,
        trained=trained_weights(summary) if summary.get("budget") else None,
        scores=by_seed,
        runs=tuple(cell.id for cell in members),
        failed=len(ended) - len(done),
        missing=len(unique) - len(ended) if members else 1,
    )


def reported(result: Result, protocol: Protocol) -> float | None:
    """What a run's result reports under a protocol; None for a run that failed, or without such a finite figure."""
    after = (result.get("summary") or {}).get("after", {})
    value = result.get("score") if protocol.score == "score" else after.get(protocol.score)
    known = result["status"] == "done" and isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]


def _average(entries: Sequence[Entry | None], protocol: Protocol) -> float | None:
    figures = [figure(entry, protocol) if entry else None for entry in entries]
    means = [estimate.mean for estimate in figures if estimate is not None]
    return fmean(means) if len(means) == len(entries) and len(means) > 1 else None


def markdown(found: Table) -> str:
    """The table as Markdown: mean +- half the interval (or the deviation), the chosen rate, a mark at an edge."""
    names = list(dict.fromkeys(key for line in found.lines for key in line.labels))
    average = ["average"] if any(line.average is not None for line in found.lines) else []
    header = [*names, *found.tasks, *average]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for line in found.lines:
        words = [line.labels.get(name, "") for name in names]
        words += [entry_text(line.entries.get(task), found.protocol) for task in found.tasks]
        words += [f"{100 * line.average:.2f}" if line.average is not None else ""] if average else []
        rows.append("| " + " | ".join(words) + " |")
    return "\n".join([*rows, "", legend(found)])


def entry_text(entry: Entry | None, protocol: Protocol) -> str:
    """A cell in words: ``82.10 ± 0.40 (3) @ 1e-3``; scores in percent."""
    estimate = figure(entry, protocol) if entry else None
    if entry is None or estimate is None:
        return "failed" if entry and entry.failed and not entry.missing else "-"
    spread = estimate.deviation if protocol.kind == "paper" or estimate.high is None else estimate.high - estimate.mean
    words = f"{100 * estimate.mean:.2f}" + (f" ± {100 * spread:.2f}" if spread is not None else "")
    words += f" ({estimate.n})" if protocol.kind == "seeds" else f" (best {estimate.n} of {estimate.of})"
    rate = (
        f" @ {entry.value}" + {"low": " [low]", "high": " [high]", "alone": " [alone]"}.get(entry.edge or "", "")
        if entry.value
        else ""
    )
    return words + rate + (f", {entry.failed} failed" if entry.failed else "")


def legend(found: Table, marks: str = "after @; [low], [high]") -> str:
    """What the figures of a table are, in a sentence or two.

    Args:
        found: The table.
        marks: Where the chosen value stands, and what marks one at the edge of its grid.
    """
    protocol, choice = found.protocol, found.choice
    if protocol.kind == "paper":
        text = f"Scores in percent: mean and deviation of the best {protocol.best} runs (the paper's protocol)."
    else:
        text = (
            f"Scores in percent: mean over seeds ± half the {100 * protocol.level:g}% interval ({protocol.interval}), with the "
            "number of seeds."
        )
    if choice:
        seeds, (place, mark) = ", ".join(map(str, choice.seeds)), marks.split("; ")
        text += f" The {choice.setting} ({place}) was chosen by {choice.by} on seed {seeds}; {mark}: at the edge of its grid."
        text += " [alone]: no other value was tried." if "@" in place else ""
        text += " Those seeds are not in the mean." if choice.report == "others" else " Those seeds are in the mean."
    return text
