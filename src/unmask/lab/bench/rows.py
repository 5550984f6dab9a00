"""The rows of a benchmark, and the schedule that measures ID3 in the middle of a run. This module imports no torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from unmask.errors import ConfigError

KINDS: dict[str, str] = {
    "frozen": "the floor: every weight is frozen, the output of the input embeddings requires grad, no optimizer",
    "full": "full fine-tuning with torch's default AdamW",
    "full-fused": "full fine-tuning with AdamW(fused=True)",
    "lora": "peft LoRA on every linear layer, with adapters in float32 as peft makes them",
    "shira": "peft SHiRA with the rank whose number of trained weights is nearest to the budget",
    "super": "peft Super-Tuning at the budget's share of the linear weights",
    "authors": "ID3 of the authors' selective-optimizers",
    "static": "unmask with a static random mask",
    "static-d3": "unmask with a static mask by D3 of the first step",
    "id3": "unmask with exact ID3, which selects at every step",
    "id3-10": "unmask, ID3 with a stride of 10",
    "id3-100": "unmask, ID3 with a stride of 100",
}
# ``all`` leaves this one out, for it is another row than lora under --dtype bf16 only.
APART = {"lora-cast": "peft LoRA on every linear layer, with adapters in the dtype of the model's weights"}
_PACKAGES = {"lora": "peft", "lora-cast": "peft", "shira": "peft", "super": "peft", "authors": "selective_optimizers"}
_LONGEST_CYCLE = 10
_SHORT_CYCLE = 4  # One step selects and three do not.
RAMP = 4  # So many steps fill half of an ID3 row's budget. At once it would take memory that no real run needs.
PLANNED_STEPS = 1_000  # The steps of the training run that is measured: each of them unmasks B / 1,000 weights.
_SHARE = 0.8  # The timed steps and the warm-up unmask at most this share of the budget.


@dataclass(frozen=True)
class Row:
    """The row of one method in a benchmark.

    Attributes:
        label: The name that the user wrote, for example ``"static"`` or ``"static@10000"``.
        kind: The method: a key of `KINDS` or `APART`, or ``"id3-K"`` for any stride K.
        budget: The budget B in scalar weights. `KINDS` says what it means for a method that is not unmask's.
    """

    label: str
    kind: str
    budget: int

    @property
    def selects(self) -> bool:
        """Returns True if the method selects weights while it trains."""
        return self.kind.startswith("id3")

    @property
    def stride(self) -> int:
        """The stride of an ID3 row; 1 for every other row."""
        return int(self.kind.removeprefix("id3-")) if self.kind.startswith("id3-") else 1

    @property
    def cycle(self) -> int:
        """The number of steps of one timed cycle: the stride, or 4 if the stride is above 10."""
        return self.stride if self.stride <= _LONGEST_CYCLE else _SHORT_CYCLE

    def cycles(self, steps: int) -> int:
        """Returns how many whole cycles hold at least so many steps."""
        return -(-steps // self.cycle)

    @property
    def what(self) -> str:
        """The description of the row in one line."""
        return (KINDS | APART).get(self.kind, f"unmask, ID3 with a stride of {self.stride}")

    @property
    def missing(self) -> str | None:
        """The reason why the row cannot run here, if a package that it needs is not installed; otherwise None."""
        package = _PACKAGES.get(self.kind)
        if package is None or importlib.util.find_spec(package) is not None:
            return None
        return f"{package} is not installed: pip install 'unmask[bench]'"


def parse_rows(text: str, budget: int) -> list[Row]:
    """Reads rows from a list of names that is separated by commas.

    ``all`` stands for every key of `KINDS`. ``NAME@BUDGET`` gives a row its budget; the other rows have ``budget``.

    Raises:
        ConfigError: A method is unknown, a budget is no count, or a row is named twice.

    Example:
        >>> [(row.label, row.budget) for row in parse_rows("frozen,static@100", 20)]
        [('frozen', 20), ('static@100', 100)]
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    labels = [name for word in words for name in (KINDS if word == "all" else (word,))]
    if not labels:
        raise ConfigError("methods is empty; give names, separated by commas, or 'all'.")
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ConfigError(f"methods names {', '.join(repeated)} more than once; name each row once.")
    rows = []
    for label in labels:
        kind, at, own = label.partition("@")
        if kind not in KINDS | APART and not re.fullmatch(r"id3-([2-9]|[1-9]\d+)", kind):
            known = ", ".join(KINDS | APART)
            raise ConfigError(f"unknown method {kind!r}; there are {known}, id3-K for a stride of K, and all.")
        if at and not (own.isdigit() and int(own) > 0):
            raise ConfigError(f"method {label!r}: the budget after @ must be a count of weights, e.g. {kind}@10000.")
        rows.append(Row(label, kind, int(own) if at else budget))
    return rows


@dataclass(frozen=True)
class MidRun:
    """The schedule b(t) that measures a method in the middle of a training run.

    A ramp of `RAMP` steps unmasks ``start`` weights. The warm-up and the timed steps after it run in cycles. The first step
    of each cycle unmasks as many weights as a stride of a run of 1,000 steps does, so that the timed steps have about half
    of the budget in use. If the stride is above 10, the cycle is shorter than the stride but unmasks as many weights.

    Attributes:
        cycle: The steps of a cycle.
        warmup: The steps between the ramp and the timed cycles; they begin with a cycle too.
        cycles: The number of cycles after the ramp, those of the warm-up included.
        start: The weights that the ramp unmasks.
        total: The weights that all cycles unmask together.
    """

    cycle: int
    warmup: int
    cycles: int
    start: int
    total: int

    def __call__(self, t: int, T: int, B: int) -> int:
        """Returns b(t), the weights that are unmasked by step t."""
        if t < RAMP:
            return max(1, self.start * (t + 1) // RAMP)
        after = t - RAMP
        if after < self.warmup:
            begun = after // self.cycle + 1
        else:
            begun = -(-self.warmup // self.cycle) + (after - self.warmup) // self.cycle + 1
        return min(B, self.start + self.total * begun // self.cycles)


def mid_run(row: Row, warmup: int, steps: int) -> MidRun:
    """Returns the schedule of an ID3 row, with so many steps of warm-up and at least so many timed steps.

    Example:
        >>> mid_run(Row("id3-10", "id3-10", 320_000), warmup=2, steps=3)
        MidRun(cycle=10, warmup=2, cycles=2, start=156800, total=6400)
    """
    cycles = row.cycles(warmup) + row.cycles(steps)
    planned = row.budget * row.stride * cycles // PLANNED_STEPS
    # Every cycle unmasks a weight, if the budget allows it.
    total = min(int(_SHARE * row.budget), max(cycles, planned))
    return MidRun(row.cycle, warmup, cycles, max(1, (row.budget - total) // 2), total)
