"""The rows of a benchmark: which methods there are and how they are named. This module imports no torch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass

from unmask.errors import ConfigError

KINDS: dict[str, str] = {
    "frozen": "the floor: every weight is frozen, the output of the input embeddings requires grad, no optimizer",
    "full": "full fine-tuning with torch's default AdamW",
    "full-fused": "full fine-tuning with AdamW(fused=True)",
    "lora": "peft LoRA on every linear layer",
    "shira": "peft SHiRA with the rank whose number of trained weights is nearest to the budget",
    "super": "peft Super-Tuning at the budget's share of the linear weights",
    "authors": "ID3 of the authors' selective-optimizers",
    "static": "unmask with a static random mask",
    "static-d3": "unmask with a static mask by D3 of the first step",
    "id3": "unmask with exact ID3, which selects at every step",
    "id3-10": "unmask, ID3 with a stride of 10",
    "id3-100": "unmask, ID3 with a stride of 100",
}
_PACKAGES = {"lora": "peft", "shira": "peft", "super": "peft", "authors": "selective_optimizers"}
_LONGEST_CYCLE = 10
_SHORT_CYCLE = 4  # one step that selects and three that do not


@dataclass(frozen=True)
class Row:
    """One method of a benchmark.

    Attributes:
        label: The name that the user wrote, for example ``"static"`` or ``"static@10000"``.
        kind: The method: a key of `KINDS`, or ``"id3-K"`` for any stride K.
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
        return KINDS.get(self.kind, f"unmask, ID3 with a stride of {self.stride}")

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
        if kind not in KINDS and not re.fullmatch(r"id3-([2-9]|[1-9]\d+)", kind):
            known = ", ".join(KINDS)
            raise ConfigError(f"unknown method {kind!r}; there are {known}, id3-K for a stride of K, and all.")
        if at and not (own.isdigit() and int(own) > 0):
            raise ConfigError(f"method {label!r}: the budget after @ must be a count of weights, e.g. {kind}@10000.")
        rows.append(Row(label, kind, int(own) if at else budget))
    return rows
