"""A record as tables: Markdown for a page, aligned text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Cells = list[str]
_NONE = "-"
TIMES = ("method", "step s (q1-q3)", "forward", "backward", "optimizer", "amortised", "/ frozen", "/ full", "tokens/s")
COSTS = ("method", "trained", "used", "peak MB", "before MB", "optimizer MB", "bytes/weight")
BARS = ("bar", "row", "limit", "measured", "rounds", "amortised", "verdict")


def times(record: Mapping[str, Any]) -> list[Cells]:
    """One line per row that was timed, or why it was not."""
    return [_time_cells(label, row) for label, row in record["rows"].items() if row["timing"] or row["reason"]]


def costs(record: Mapping[str, Any]) -> list[Cells]:
    """One line per row whose memory was measured, or why it was not."""
    return [_cost_cells(label, row) for label, row in record["rows"].items() if row["memory"]]


def verdicts(record: Mapping[str, Any]) -> list[Cells]:
    """One line per bar and numerator."""
    lines = []
    for entry in record["verdicts"]["bars"]:
        rounds = entry["rounds"]
        lines.append(
            [
                entry["bar"],
                entry["row"],
                f"{entry['limit']:.2f}",
                _number(entry["measured"], 3),
                f"{rounds['min']:.3f}-{rounds['max']:.3f}" if rounds else _NONE,
                _number(entry["amortised"], 3),
                entry["verdict"],
            ]
        )
    return lines


def curve(record: Mapping[str, Any]) -> tuple[Cells, list[Cells]]:
    """A curve's points: header and lines."""
    points = record["points"]
    header = list(points[0]) if points else ["no points"]
    return header, [[_cell(point.get(key)) for key in header] for point in points]


def markdown(record: Mapping[str, Any]) -> str:
    """The whole record as a page: what ran where, the tables, the bars."""
    parts = [_heading(record)]
    if "points" in record:
        parts.append(_markdown_table(*curve(record)))
        parts.extend(record["notes"])
    else:
        for header, lines in ((TIMES, times(record)), (COSTS, costs(record)), (BARS, verdicts(record))):
            if lines:
                parts.append(_markdown_table(list(header), lines))
        parts.extend(remarks(record))
    return "\n\n".join(parts) + "\n"


def remarks(record: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know: missing rows, groups, bars that do not apply."""
    lines = [f"{label}: {row['status']}: {row['reason']}" for label, row in record["rows"].items() if row["reason"]]
    for label, row in record["rows"].items():
        lines += [f"{label}, {key}: {row['memory'][key]}" for key in ("error", "saved_error") if key in row["memory"]]
    if record["grouping"] and record["grouping"]["note"]:
        lines.append(f"Not all rows fitted into memory together: {record['grouping']['note']}.")
    if not record["verdicts"]["apply"]:
        lines.append(f"The bars do not apply to this run: {'; '.join(record['verdicts']['because'])}.")
    return lines


def plain(header: Sequence[str], lines: Sequence[Cells]) -> str:
    """Aligned columns, the first to the left."""
    table = [list(header), *lines]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def _heading(record: Mapping[str, Any]) -> str:
    machine, model, settings = record["machine"], record["model"], record["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    versions += f" ({machine['commit'][:7]})" if machine.get("commit") else ""
    lines = [f"    {record['command']}"] if record["command"] else []
    where = machine["device"] if machine["device"] != "cpu" else machine["cpu"]
    allocator = "".join(f"; {name}={value}" for name, value in machine["allocator"].items())
    allocator += "".join(f"; {name}: {value}" for name, value in (record["grouping"] or {}).get("heap", {}).items())
    lines.append(f"{where}, {machine['threads']} threads of {machine['cores']} cores; {versions}{allocator}.")
    if model:
        dropout = ", ".join(f"{name} {value}" for name, value in model["dropout"].items() if value is not None)
        lines.append(
            f"{model['name']} ({model['parameters']:,} weights, random), batch {model['batch_size']} x {model['seq_len']}, "
            f"{settings['dtype']}, budget {settings['budget']:,}, {_rounds(settings)}; training mode, {dropout}."
        )
    return "\n\n".join(lines)


def _markdown_table(header: Cells, lines: list[Cells]) -> str:
    rule = "|---" + "|---:" * (len(header) - 1) + "|"
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def _time_cells(label: str, row: Mapping[str, Any]) -> Cells:
    figures = row["timing"]
    if not figures:
        return [label, row["status"], *[_NONE] * (len(TIMES) - 2)]
    total = figures["total"]
    return [
        label,
        f"{total['median']:.4g} ({total['q1']:.4g}-{total['q3']:.4g})",
        *(f"{figures[phase]['median']:.4g}" for phase in ("forward", "backward", "optimizer")),
        _number(figures.get("amortised"), 4),
        *(_number((row["ratios"].get(name) or {}).get("ratio"), 3) for name in ("frozen", "full")),
        f"{figures['tokens_per_second']:,.0f}",
    ]


def _cost_cells(label: str, row: Mapping[str, Any]) -> Cells:
    memory = row["memory"]
    if "peak_mb" not in memory:
        return [label, "failed", *[_NONE] * (len(COSTS) - 2)]
    per_weight = memory.get("bytes_per_weight")
    return [
        label,
        f"{memory['trainable']:,}",
        f"{memory['trained']:,}",
        f"{memory['peak_mb']:,.0f}",
        f"{memory['before_mb']:,.0f}" if memory["before_mb"] is not None else _NONE,
        f"{memory['state_bytes'] / 1e6:,.1f}",
        f"{per_weight:.2f}" if per_weight is not None else _NONE,
    ]


def _rounds(settings: Mapping[str, Any]) -> str:
    draws = settings.get("draws", 1)
    return f"{settings['rounds']} rounds" + (f" in each of {draws} draws" if draws > 1 else "")


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else _NONE if value is None else str(value)
