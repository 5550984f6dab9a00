"""The bars: what the project has promised of these figures, as data, and whether a run meets them. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.stats import StepTime, ratio

Quantity = Literal["step", "memory"]


@dataclass(frozen=True)
class Bar:
    """One promise: a quantity of every numerator row, over that of the denominator row, is at most the limit.

    Attributes:
        name: In words.
        numerators: Labels of rows.
        denominator: Label of a row.
        quantity: ``"step"``: the median over all timed steps; ``"memory"``: peak memory.
        limit: The ratio at most.
        dtype: What the bar is defined for.
    """

    name: str
    numerators: tuple[str, ...]
    denominator: str
    quantity: Quantity
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
_DEFINED_FOR = {"model": "roberta-base", "batch_size": 16, "seq_len": 128, "budget": 320_000, "threads": 2, "lora_r": 8}


def off_reference(settings: BenchSettings, batch: int, length: int, device: str) -> list[str]:
    """In what a run differs from the configuration that the bars are defined for; empty: in nothing."""
    given = {**settings.as_json(), "batch_size": batch, "seq_len": length}
    differs = [f"{name} is {given[name]}, not {value}" for name, value in _DEFINED_FOR.items() if given[name] != value]
    if settings.dtype not in {bar.dtype for bar in BARS}:
        differs.append(f"dtype is {settings.dtype}, not float32 or autocast")
    return differs + ([] if device == "cpu" else [f"device is {device}, not cpu"])


def judge(
    steps: Mapping[str, Sequence[StepTime]],
    peaks: Mapping[str, float],
    amortised: Mapping[str, float],
    dtype: str,
    bars: Sequence[Bar] = BARS,
) -> list[dict[str, Any]]:
    """Every bar of a dtype against the measurements, one entry per numerator.

    Args:
        steps: Timed steps by label, of the rows that have them.
        peaks: Peak memory by label.
        amortised: Of strided rows, the amortised over the median step, by label.
        dtype: The run's.
        bars: The bars.

    Returns:
        Entries with ``bar``, ``row``, ``against``, ``quantity``, ``limit``, ``measured`` (None if a row is missing),
        ``rounds`` (the spread of the rounds' own ratios), ``amortised`` (the ratio that counts selecting steps in) and
        ``verdict``: met, not met or not measured.
    """
    via = steps.get("frozen", ())
    return [
        _judged(bar, row, steps, peaks, amortised, via) for bar in bars if bar.dtype == dtype for row in bar.numerators
    ]


def _judged(
    bar: Bar,
    row: str,
    steps: Mapping[str, Sequence[StepTime]],
    peaks: Mapping[str, float],
    amortised: Mapping[str, float],
    via: Sequence[StepTime],
) -> dict[str, Any]:
    found: dict[str, Any] | None = None
    if bar.quantity == "memory" and row in peaks and bar.denominator in peaks:
        found = {"ratio": peaks[row] / peaks[bar.denominator]}
    elif bar.quantity == "step" and steps.get(row) and steps.get(bar.denominator):
        found = ratio(steps[row], steps[bar.denominator], via)
    measured = found["ratio"] if found else None
    verdict = "not measured" if measured is None else "met" if measured <= bar.limit else "not met"
    counted = bar.quantity == "step" and measured is not None and row in amortised
    return {
        "bar": bar.name,
        "row": row,
        "against": bar.denominator,
        "quantity": bar.quantity,
        "limit": bar.limit,
        "measured": measured,
        "rounds": found.get("rounds") if found else None,
        "amortised": measured * amortised[row] if counted and measured is not None else None,
        "verdict": verdict,
    }
