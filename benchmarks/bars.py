"""Judges a benchmark record by the bars: the limits that this project has set itself for its own figures.

    python benchmarks/bars.py OUT/reference/bench.json

The bars are defined for one configuration. For a record of another one the script says in what it differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unmask.lab.bench import tables

HEADER = ("bar", "row", "limit", "measured", "draws", "amortised", "verdict")


@dataclass(frozen=True)
class Bar:
    """One limit: a quantity of each numerator row, over that of the denominator row, is at most the limit.

    Attributes:
        name: The bar in words.
        numerators: The labels of the rows that are judged.
        denominator: The label of the row that they are compared with.
        quantity: ``"step"`` for the time of a step, ``"memory"`` for the peak memory.
        limit: The largest ratio that meets the bar.
        dtype: The dtype of the runs that the bar is defined for.
    """

    name: str
    numerators: tuple[str, ...]
    denominator: str
    quantity: Literal["step", "memory"]
    limit: float
    dtype: str = "float32"


CHEAP = ("static", "id3-10")
BARS: tuple[Bar, ...] = (
    Bar("static and ID3 stride 10, step, against the frozen backward", CHEAP, "frozen", "step", 1.05),
    Bar("static and ID3 stride 10, step, against LoRA r=8", CHEAP, "lora", "step", 0.88),
    Bar("ID3 stride 10, step, against full fine-tuning", ("id3-10",), "full", "step", 0.62),
    Bar("exact ID3, step, against full fine-tuning", ("id3",), "full", "step", 0.93),
    Bar("exact ID3, step, against selective-optimizers", ("id3",), "authors", "step", 0.65),
    Bar("static, step, against peft SHiRA", ("static",), "shira", "step", 0.65),
    Bar("peak memory, ID3 stride 10, against peft SHiRA", ("id3-10",), "shira", "memory", 0.95),
    Bar("peak memory, exact ID3, against full fine-tuning", ("id3",), "full", "memory", 0.70),
    Bar("peak memory, static and ID3 stride 10, against the frozen backward", CHEAP, "frozen", "memory", 1.28),
    Bar("static, step at B = 1e6 against step at B = 1e4", ("static@1000000",), "static@10000", "step", 1.15),
    Bar("bf16 autocast: ID3 stride 10, step, against LoRA r=8", ("id3-10",), "lora", "step", 0.90, "autocast"),
)
_SETTINGS = {"model": "roberta-base", "budget": 320_000, "threads": 2, "lora_r": 8}
_BATCH = {"batch_size": 16, "seq_len": 128}


def off_reference(record: Mapping[str, Any]) -> list[str]:
    """Returns in what a record differs from the configuration of the bars; an empty list if in nothing."""
    given = {**record["settings"], **{name: record["model"][name] for name in _BATCH}}
    wanted = {**_SETTINGS, **_BATCH}
    differs = [f"{name} is {given[name]}, not {value}" for name, value in wanted.items() if given[name] != value]
    if given["dtype"] not in {bar.dtype for bar in BARS}:
        differs.append(f"dtype is {given['dtype']}, not float32 or autocast")
    device = record["machine"]["device"]
    return differs + ([] if device == "cpu" else [f"device is {device}, not cpu"])


def judge(record: Mapping[str, Any], bars: Sequence[Bar] = BARS) -> list[dict[str, Any]]:
    """Judges every bar of the record's dtype, for each of its numerators.

    Args:
        record: The record of a benchmark, as ``bench.json`` holds it.
        bars: The bars.

    Returns:
        Entries with ``bar``, ``row``, ``against``, ``limit``, ``measured`` (None if a row is missing), ``draws`` (the spread
        of the draws' own ratios), ``amortised`` (the ratio of a strided row's amortised step) and ``verdict``, which is
        met, not met or not measured.
    """
    dtype = record["settings"]["dtype"]
    return [_judge(record, bar, row) for bar in bars if bar.dtype == dtype for row in bar.numerators]


def _judge(record: Mapping[str, Any], bar: Bar, row: str) -> dict[str, Any]:
    above, below = (record["rows"].get(label) for label in (row, bar.denominator))
    measured = draws = amortised = None
    if above and below and bar.quantity == "memory" and above["memory"] and below["memory"]:
        measured = above["memory"]["peak_mb"] / below["memory"]["peak_mb"]
    elif above and below and bar.quantity == "step" and above["timing"] and below["timing"]:
        found = tables.ratio(_steps(above), _steps(below))
        if found:
            measured, draws = found["ratio"], found["draws"]
            times = above["timing"]
            amortised = measured * times["amortised"] / times["total"]["median"] if "amortised" in times else None
    verdict = "not measured" if measured is None else "met" if measured <= bar.limit else "not met"
    figures = {"limit": bar.limit, "measured": measured, "draws": draws, "amortised": amortised}
    return {"bar": bar.name, "row": row, "against": bar.denominator, **figures, "verdict": verdict}


def _steps(row: Mapping[str, Any]) -> list[tables.StepTime]:
    names = ("draw", "forward", "backward", "optimizer", "selecting")
    return [tables.StepTime(**{name: step[name] for name in names}) for step in row["steps"]]


def table(entries: Sequence[Mapping[str, Any]]) -> list[tables.Cells]:
    """Returns a line for each entry that was measured; its columns are `HEADER`."""
    lines = []
    for entry in entries:
        if entry["measured"] is None:
            continue
        draws = entry["draws"]
        spread = f"{draws['min']:.3f}-{draws['max']:.3f}" if draws else "-"
        figures = [f"{entry['limit']:.2f}", tables.number(entry["measured"], 3), spread]
        lines.append([entry["bar"], entry["row"], *figures, tables.number(entry["amortised"], 3), entry["verdict"]])
    return lines


def main() -> None:
    """Prints the verdicts about the record that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/bars.py OUT/reference/bench.json")
    record = json.loads(Path(sys.argv[1]).read_text())
    differs = off_reference(record)
    print(f"The bars do not apply: {'; '.join(differs)}." if differs else tables.plain(HEADER, table(judge(record))))


if __name__ == "__main__":
    main()
