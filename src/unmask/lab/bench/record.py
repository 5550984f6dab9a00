"""The benchmark's record: everything measured, as JSON, rewritten while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unmask.lab.bench.bars import judge, off_reference
from unmask.lab.bench.rounds import RowResult
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.stats import ratio, timing

REFERENCES = ("frozen", "full", "lora")


def derive(results: Sequence[RowResult], tokens: int, raw: bool = True) -> dict[str, Any]:
    """Every row's figures from its steps, by label.

    Args:
        results: The rows.
        tokens: Per step.
        raw: Keep each step's times too.
    """
    steps = {result.row.label: result.steps for result in results if result.steps}
    return {result.row.label: _row(result, steps, tokens, raw) for result in results}


def _row(result: RowResult, steps: Mapping[str, Sequence[Any]], tokens: int, raw: bool) -> dict[str, Any]:
    row, memory = result.row, dict(result.memory)
    if memory.get("saved_bytes") and memory.get("trained"):
        memory["bytes_per_weight"] = memory["saved_bytes"] / memory["trained"]
    entry: dict[str, Any] = {
        "what": row.what,
        "status": result.status,
        "reason": result.reason,
        "budget": row.budget,
        "stride": row.stride,
        "cycle": row.cycle,
        "weights": result.facts,
        "timing": timing(result.steps, row.stride, tokens) if result.steps else None,
        "ratios": _ratios(result, steps),
        "memory": memory,
    }
    return entry | ({"steps": [step.as_json() for step in result.steps]} if raw else {})


def _ratios(result: RowResult, steps: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    if not result.steps:
        return {}
    via = steps.get("frozen", ())
    return {name: ratio(result.steps, steps[name], via) for name in REFERENCES if name in steps}


def verdicts(
    results: Sequence[RowResult], rows: Mapping[str, Any], settings: BenchSettings, batch: int, length: int, device: str
) -> dict[str, Any]:
    """The bars against this run, or why they do not apply to it."""
    differs = off_reference(settings, batch, length, device)
    if differs:
        return {"apply": False, "because": differs, "bars": []}
    steps = {result.row.label: result.steps for result in results if result.steps}
    peaks = {label: row["memory"]["peak_mb"] for label, row in rows.items() if "peak_mb" in row["memory"]}
    amortised = {
        label: row["timing"]["amortised"] / row["timing"]["total"]["median"]
        for label, row in rows.items()
        if row["timing"] and "amortised" in row["timing"]
    }
    return {"apply": True, "because": [], "bars": judge(steps, peaks, amortised, settings.dtype)}
