"""The tables of a sweep: a row for each method, columns of tasks, the paper's figures next to ours. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from unmask.lab.figures.estimates import Estimate, best_of, interval
from unmask.lab.study.cells import Cell, Group, distinct
from unmask.lab.study.choosing import Choices, choose, choosing, paired
from unmask.lab.study.columns import Column, columns_of, task_of
from unmask.lab.study.records import trained_weights
from unmask.lab.study.spec import Choice, Claim, Claims, Protocol
from unmask.lab.study.store import Results

EDGES = {"low": "the lowest value tried", "high": "the highest value tried"}


@dataclass(frozen=True)
class Entry:
    """The content of one cell of a table.

    Attributes:
        seeds: The mean over all runs, with an interval; None while no run is done.
        best: The mean of the best runs, and their deviation; None while no run is done.
        value: The chosen value of the swept setting (the learning rate); None without a choice.
        edge: The position of the chosen value in its grid; see `unmask.lab.study.choosing.Chosen`.
        tried: The figure that each value was compared by; see there.
        metric: The metric of the scores.
        trained: The number of weights that a run trains, the largest of all runs; None while no run is done.
        scores: The score of each seed.
        failed: How many runs failed.
        missing: How many runs have not ended.
    """

    seeds: Estimate | None
    best: Estimate | None
    value: Any = None
    edge: str | None = None
    tried: Mapping[str, float] = field(default_factory=dict)
    metric: str = "score"
    trained: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    failed: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Line:
    """The content of a row of a table.

    Attributes:
        labels: ``method``, and the axes other than task and seed.
        entries: The entries by column.
        average: The mean of the columns' figures; None if one is missing, or if there is one column.
        claim: The row of the paper's table that stands next to it; None if there is none.
    """

    labels: Mapping[str, str]
    entries: Mapping[str, Entry]
    average: float | None
    claim: Claim | None = None


@dataclass(frozen=True)
class Table:
    """The content of a sweep's table.

    Attributes:
        columns: The columns' labels.
        lines: The rows, in the order of the cells.
        protocol: The protocol that decides which of an entry's figures is shown.
        choice: How the swept setting was chosen; None if none was chosen.
        title: The title of the table.
        model: The model of the paper's figures that stand next to ours; empty if there are none.
    """

    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    protocol: Protocol
    choice: Choice | None
    title: str = ""
    model: str = ""


def tables(
    cells: Sequence[Cell],
    results: Results,
    protocol: Protocol,
    choice: Choice | None = None,
    claims: Claims | None = None,
) -> list[Table]:
    """Returns the tables of a grid, as far as it has been run; the table of the sweep's own protocol is the first.

    The paper's figures, if there are any, stand next to those of the first table.
    """
    paper, seeds = replace(protocol, kind="paper"), replace(protocol, kind="seeds")
    ours = "Ours: " if protocol.pair else ""
    if choice:
        ours += f"{choice.setting} chosen by {choice.by} on seed {', '.join(map(str, choice.seeds))}, then "
    ours += "mean over seeds"
    by_choice = table(cells, results, seeds, choice, ours[0].upper() + ours[1:])
    if protocol.pair is None:
        best = table(cells, results, paper, choice, "The best runs alone")
        shown = [best, by_choice] if protocol.kind == "paper" else [by_choice, best]
    elif protocol.kind == "seeds":
        shown = [by_choice]
    else:
        pairs = paired(cells, protocol.pair)
        title = f"The paper's protocol: a run for each {protocol.pair} with its own seed, and the best of them"
        every = table(pairs, results, seeds, None, "The same runs, all of them: mean with a confidence interval")
        shown = [table(pairs, results, paper, None, title), *([by_choice] if protocol.kind == "both" else []), every]
    if claims is not None:
        lines = tuple(replace(line, claim=claims.of(line.labels)) for line in shown[0].lines)
        shown[0] = replace(shown[0], lines=lines, model=claims.model)
    return shown


def table(
    cells: Sequence[Cell], results: Results, protocol: Protocol, choice: Choice | None = None, title: str = ""
) -> Table:
    """Returns one table of some cells, as far as they have been run; without a choice every cell counts."""
    chosen: Choices = choose(cells, choice, results) if choice else {}
    swept = choice.setting if choice else protocol.pair
    rows: dict[Group, dict[str, list[Cell]]] = {}
    for cell in cells:
        own = {k: v for k, v in cell.labels.items() if k not in ("task", "seed", swept) and v is not None}
        labels = tuple((key, str(value)) for key, value in own.items())
        rows.setdefault(labels, {}).setdefault(task_of(cell), []).append(cell)
    columns = columns_of(cells, results, protocol)
    lines = []
    for labels, by_task in rows.items():
        entries = {
            column.label: _entry(by_task[column.task], column, results, protocol, choice, chosen)
            for column in columns
            if column.task in by_task
        }
        means = [estimate.mean for entry in entries.values() if (estimate := figure(entry, protocol))]
        average = fmean(means) if len(means) == len(columns) and len(means) > 1 else None
        lines.append(Line(dict(labels), entries, average))
    return Table(tuple(column.label for column in columns), tuple(lines), protocol, choice, title)


def figure(entry: Entry, protocol: Protocol) -> Estimate | None:
    """Returns the figure of an entry under a protocol."""
    return entry.best if protocol.kind == "paper" else entry.seeds


def spread(estimate: Estimate, protocol: Protocol) -> str | None:
    """Returns half the interval of a figure, or its deviation, in percent; None for one run."""
    half = estimate.deviation if protocol.kind == "paper" or estimate.high is None else estimate.high - estimate.mean
    return None if half is None else f"{100 * half:.2f}"


def _entry(
    members: list[Cell], column: Column, results: Results, protocol: Protocol, choice: Choice | None, chosen: Choices
) -> Entry:
    pick = chosen[members[0].group(choice.setting, "seed")] if choice else None
    if choice and pick:
        if pick.final and pick.value is None:  # No value of the grid has a run that is done.
            return Entry(None, None, failed=len(distinct(c for c in members if choosing(c, choice))))
        members = [c for c in members if c.label(choice.setting) == str(pick.value)]
        others = [c for c in members if not choosing(c, choice)]
        members = others if choice.report == "others" and others else members
    unique = distinct(members)
    ended = [(cell, results[cell.id]) for cell in unique if cell.id in results]
    done = [(cell, result, score) for cell, result in ended if (score := column.value(result)) is not None]
    by_seed = {str(cell.settings.get("seed", 0)): score for cell, _, score in done}
    scores, first = list(by_seed.values()), done[0][1] if done else {}
    summaries = [result.get("summary") or {} for _, result, _ in done]
    return Entry(
        seeds=interval(scores, protocol.level, protocol.interval) if scores else None,
        best=best_of(scores, protocol.best) if scores else None,
        value=pick.value if pick else None,
        edge=pick.edge if pick else None,
        tried=pick.tried if pick else {},
        metric=column.metric or str(first.get("metric", "score")),
        trained=max((trained_weights(summary) for summary in summaries if summary.get("budget")), default=None),
        scores=by_seed,
        failed=len(ended) - len(done),
        missing=len(unique) - len(ended) if members else 1,
    )


def markdown(found: Table) -> str:
    """Returns the table as Markdown, under its title.

    A cell has the mean, half the interval (or the deviation) and the chosen value, with a mark at an edge. If the
    table has the paper's figures, each column of ours has the paper's at its right, and the last column names the
    paper's model and budget.
    """
    names = list(dict.fromkeys(key for line in found.lines for key in line.labels))
    claimed, averages = bool(found.model), any(line.average is not None for line in found.lines)
    header = [*names, "weights"]
    for column in (*found.columns, *(["average"] if averages else [])):
        header += [column, "paper"] if claimed else [column]
    header += ["the paper's model and budget"] if claimed else []
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for line in found.lines:
        words = [line.labels.get(name, "") for name in names] + [trained_text(line)]
        for column in found.columns:
            words += [entry_text(line.entries.get(column), found.protocol)]
            words += [claim_text(line.claim, column)] if claimed else []
        if averages:
            words += [f"{100 * line.average:.2f}" if line.average is not None else ""]
            words += [average_text(line.claim)] if claimed else []
        words += [f"{found.model}, {line.claim.count}" if line.claim else ""] if claimed else []
        rows.append("| " + " | ".join(words) + " |")
    title = [f"**{found.title}**", ""] if found.title else []
    return "\n".join([*title, *rows, "", legend(found)])


def trained_text(line: Line) -> str:
    """Returns the least and the greatest number of weights that a line's runs train; empty while no run is done."""
    counts = {entry.trained for entry in line.entries.values() if entry.trained}
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) if counts else ""


def claim_text(claim: Claim | None, column: str) -> str:
    """Returns the paper's figure of a column as it is printed: mean and deviation."""
    return "" if claim is None else claim.scores.get(column, "").replace(" ", " ± ")


def average_text(claim: Claim | None) -> str:
    """Returns the paper's average as it is printed, and the mean of its printed columns if the two differ.

    Example:
        >>> average_text(Claim("id3", None, "103K", {"a": "80.0 0.1", "b": "82.0 0.2"}, "81.5"))
        '81.5 (of its columns: 81.00)'
    """
    if claim is None or claim.average is None:
        return ""
    rounding = 0.51 / 10 ** len(claim.average.partition(".")[2])  # This is half a unit of the last printed digit.
    differs = abs(claim.mean - float(claim.average)) > rounding
    return claim.average + (f" (of its columns: {claim.mean:.2f})" if differs else "")


def entry_text(entry: Entry | None, protocol: Protocol) -> str:
    """Returns a cell as text, with scores in percent: ``82.10 ± 0.40 (3) @ 1e-3``."""
    estimate = figure(entry, protocol) if entry else None
    if entry is None or estimate is None:
        return "failed" if entry and entry.failed and not entry.missing else "-"
    half = spread(estimate, protocol)
    words = f"{100 * estimate.mean:.2f}" + (f" ± {half}" if half is not None else "")
    words += f" ({estimate.n})" if protocol.kind == "seeds" else f" (best {estimate.n} of {estimate.of})"
    if entry.value:
        words += f" @ {entry.value}" + (f" [{entry.edge}]" if entry.edge else "")
    return words + (f", {entry.failed} failed" if entry.failed else "")


def legend(found: Table, marks: str = "after @; [low], [high]") -> str:
    """Describes the figures of a table in a few sentences.

    ``marks`` names the place of the chosen value in a cell, and the mark of a value at the edge of its grid.
    """
    protocol, choice = found.protocol, found.choice
    if protocol.kind == "paper":
        counts = {(e.best.n, e.best.of) for line in found.lines for e in line.entries.values() if e.best}
        which = f"the best {protocol.best} runs, or of all where there are fewer"
        if len(counts) == 1:
            n, of = counts.pop()
            which = f"the best {n} of {of} runs" if of > 1 else "the one run (no deviation)"
        text = f"Scores in percent: mean and standard deviation (over n - 1) of {which}."
    else:
        text = (
            f"Scores in percent: mean over runs ± half the {100 * protocol.level:g}% interval ({protocol.interval}), "
            "with the number of runs."
        )
    if choice:
        (place, mark), seeds = marks.split("; "), ", ".join(map(str, choice.seeds))
        text += f" The {choice.setting} ({place}) was chosen by {choice.by} on seed {seeds}; "
        text += f"{mark}: at the edge of its grid."
        text += " [alone]: no other value was tried." if "@" in place else ""
        text += " Those seeds are not in the mean." if choice.report == "others" else " Those seeds are in the mean."
    if found.model:
        text += f" The columns named paper hold what the paper prints for {found.model}, which was not measured here."
    return text
