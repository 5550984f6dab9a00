"""Turns step times into figures, and a record into tables. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Any

Cells = list[str]
REFERENCES = ("frozen", "full", "lora")  # The rows that every other row is compared with.
PHASES = ("forward", "backward", "optimizer", "total")
TIMES = ("method", "step s (q1-q3)", "forward", "backward", "optimizer", "amortised", "/ frozen", "/ full", "tokens/s")
COSTS = ("method", "trained", "used", "peak MB", "before MB", "optimizer MB", "bytes/weight")
HOST = ("row", "ms a step", "/ lora", "operations", "waiting")
DELTA = ("row", "ms", "least ms", "CPU ms", "MB on disk")
_NONE = "-"


@dataclass(frozen=True)
class StepTime:
    """The times of one training step, in seconds.

    Attributes:
        draw: The number of the draw. Steps of different rows are compared within a draw.
        forward: The forward pass with the loss.
        backward: The backward pass.
        optimizer: ``step`` and ``zero_grad``.
        selecting: True if the step unmasked weights.
    """

    draw: int
    forward: float
    backward: float
    optimizer: float
    selecting: bool = False

    @property
    def total(self) -> float:
        """The time of the whole step."""
        return self.forward + self.backward + self.optimizer


def spread(values: Iterable[float]) -> dict[str, float]:
    """Returns the median, the quartiles and the range.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])["q3"]
        4.0
    """
    ordered = sorted(values)
    q1, middle, q3 = quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {"median": middle, "q1": q1, "q3": q3, "min": ordered[0], "max": ordered[-1]}


def timing(steps: Sequence[StepTime], stride: int, tokens: int) -> dict[str, Any]:
    """Returns a row's figures over all its timed steps.

    A stride above 1 adds the medians of the steps that select and of those between them, and the amortised step, which a
    whole run pays on average: ``(selecting + (stride - 1) between) / stride`` of the two means. This is the mean step if the
    cycle is the stride, and tells what a longer stride costs if the cycle is shorter. A row with a stride has its steps in
    whole cycles.
    """
    figures: dict[str, Any] = {phase: spread(getattr(step, phase) for step in steps) for phase in PHASES}
    figures["steps"] = len(steps)
    figures["tokens_per_second"] = tokens / figures["total"]["median"]
    selecting = [step.total for step in steps if step.selecting]
    between = [step.total for step in steps if not step.selecting]
    if stride > 1 and selecting and between:
        figures["selecting"], figures["between"] = median(selecting), median(between)
        figures["amortised"] = (fmean(selecting) + (stride - 1) * fmean(between)) / stride
    return figures


def by_draw(steps: Sequence[StepTime], phase: str = "total") -> dict[int, float]:
    """Returns the median time of a phase in every draw.

    Example:
        >>> by_draw([StepTime(0, 1.0, 2.0, 0.0), StepTime(1, 1.0, 3.0, 0.0)])
        {0: 3.0, 1: 4.0}
    """
    draws = sorted({step.draw for step in steps})
    return {draw: median(getattr(step, phase) for step in steps if step.draw == draw) for draw in draws}


def ratio(above: Sequence[StepTime], below: Sequence[StepTime], phase: str = "total") -> dict[str, Any] | None:
    """Compares the step of one row with that of another.

    The ratio is the median of the draws' own ratios, so that a machine that grows slower from one draw to the next does not
    change it.

    Returns:
        ``ratio``, and ``draws``: the spread of the draws' own ratios of medians, with ``each`` of them. None if the rows
        have no draw in common.

    Example:
        >>> slow, fast = [StepTime(0, 1.0, 2.0, 0.0)], [StepTime(0, 0.5, 1.0, 0.0)]
        >>> ratio(slow, fast)["ratio"]
        2.0
    """
    first, second = by_draw(above, phase), by_draw(below, phase)
    each = [first[draw] / second[draw] for draw in first if draw in second]
    if not each:
        return None
    draws = spread(each)
    return {"ratio": draws["median"], "draws": {**draws, "each": each}}


def times(record: Mapping[str, Any]) -> list[Cells]:
    """Returns a line for each row with its times, or with the reason why it has none."""
    lines = []
    for label, row in record["rows"].items():
        figures = row["timing"]
        if figures:
            *phases, total = (figures[phase] for phase in PHASES)
            step = f"{total['median']:.4g} ({total['q1']:.4g}-{total['q3']:.4g})"
            medians = [f"{phase['median']:.4g}" for phase in phases]
            ratios = [number((row["ratios"].get(name) or {}).get("ratio"), 3) for name in ("frozen", "full")]
            speed = f"{figures['tokens_per_second']:,.0f}"
            lines.append([label, step, *medians, number(figures.get("amortised"), 4), *ratios, speed])
        elif row["reason"]:
            lines.append([label, row["status"], *[_NONE] * (len(TIMES) - 2)])
    return lines


def costs(record: Mapping[str, Any]) -> list[Cells]:
    """Returns a line for each row with its memory and its bytes on disk."""
    lines = []
    for label, row in record["rows"].items():
        memory, weights = row["memory"], row["weights"]
        if memory:
            counts = [f"{weights['trainable']:,}", f"{weights['trained']:,}", f"{memory['peak_mb']:,.0f}"]
            before = f"{memory['before_mb']:,.0f}" if memory["before_mb"] is not None else _NONE
            state, saved = f"{memory['state_bytes'] / 1e6:,.1f}", number(memory.get("bytes_per_weight"), 2)
            lines.append([label, *counts, before, state, saved])
    return lines


def curve(record: Mapping[str, Any]) -> tuple[Cells, list[Cells]]:
    """Returns the header and the lines of a curve's points."""
    points = record["points"]
    header = list(points[0]) if points else ["no points"]
    return header, [[_cell(point.get(key)) for key in header] for point in points]


def markdown(record: Mapping[str, Any]) -> str:
    """Returns the whole record as a page: the command, the machine, the tables and the remarks."""
    parts = [_heading(record)]
    if "points" in record:
        parts += [markdown_table(*curve(record)), *record["notes"]]
    else:
        tables = ((TIMES, times(record)), (COSTS, costs(record)))
        parts += [markdown_table(header, lines) for header, lines in tables if lines]
        parts += remarks(record)
    return "\n\n".join(parts) + "\n"


def remarks(record: Mapping[str, Any]) -> list[str]:
    """Returns what a reader of the tables must know: the rows that are missing, and files that could not be saved."""
    rows = record["rows"].items()
    unsaved = {label: row["memory"]["saved_error"] for label, row in rows if "saved_error" in row["memory"]}
    lines = [f"{label}: {row['status']}: {row['reason']}" for label, row in rows if row["reason"]]
    return lines + [f"{label} could not be saved: {error}" for label, error in unsaved.items()]


def host(record: Mapping[str, Any]) -> list[Cells]:
    """Returns the lines of a record of host costs; their header is `HOST`."""
    return [
        [
            row["row"],
            f"{1e3 * row['seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['operations']:,}",
            f"{row['waiting']:,}",
        ]
        for row in record["rows"]
    ]


def delta(record: Mapping[str, Any]) -> list[Cells]:
    """Returns the lines of a record of deltas; their header is `DELTA`."""
    lines = []
    for row in record["rows"]:
        times = [f"{1e3 * row[name]:,.1f}" for name in ("seconds", "least", "process")]
        lines.append([row["row"], *times, _NONE if row["saved_bytes"] is None else f"{row['saved_bytes'] / 1e6:,.1f}"])
    return lines


def plain(header: Sequence[str], lines: Sequence[Cells]) -> str:
    """Returns a table as text with aligned columns, the first to the left.

    Example:
        >>> print(plain(("row", "s"), [["static", "10"]]))
        row      s
        static  10
    """
    table = [list(header), *lines]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in table]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def markdown_table(header: Sequence[str], lines: Sequence[Cells]) -> str:
    """Returns a table as Markdown, with numbers to the right."""
    rule = "|---" + "|---:" * (len(header) - 1) + "|"
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def number(value: float | None, digits: int) -> str:
    """Returns a number with so many digits after the point, or a dash if there is none."""
    return _NONE if value is None else f"{value:.{digits}f}"


def _heading(record: Mapping[str, Any]) -> str:
    machine, model, settings = record["machine"], record["model"], record["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    versions += f" ({machine['commit'][:7]})" if machine.get("commit") else ""
    lines = [f"    {record['command']}"] if record["command"] else []
    where = machine["device"] if machine["device"] != "cpu" else machine["cpu"]
    allocator = "".join(f"; {name}={value}" for name, value in machine["allocator"].items())
    lines.append(f"{where}, {machine['threads']} threads of {machine['cores']} cores; {versions}{allocator}.")
    if model:
        dropout = ", ".join(f"{name} {value}" for name, value in model["dropout"].items() if value is not None)
        lines.append(
            f"{model['name']} ({model['parameters']:,} weights, random), batch {model['batch_size']} x {model['seq_len']}, "
            f"{settings['dtype']}, budget {settings['budget']:,}, draws {settings['draws']}; training mode, {dropout}."
        )
    return "\n\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else _NONE if value is None else str(value)
