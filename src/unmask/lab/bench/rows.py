"""The rows of a benchmark: which methods there are, and how they are named. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unmask.errors import ConfigError

KINDS: dict[str, str] = {
    "frozen": "the floor: every weight frozen, the input embeddings' output requires grad; no optimizer",
    "full": "full fine-tuning, AdamW as it comes",
    "full-fused": "full fine-tuning, AdamW(fused=True)",
    "lora": "peft LoRA on every linear layer",
    "shira": "peft SHiRA, the rank whose count of trained weights is nearest to the budget",
    "super": "peft Super-Tuning at the budget's share of the linear weights",
    "authors": "ID3 of the authors' selective-optimizers",
    "static": "unmask, a static random mask",
    "static-d3": "unmask, a static mask by D3 of the first step",
    "id3": "unmask, exact ID3: selects at every step",
    "id3-10": "unmask, ID3 with a stride of 10",
    "id3-100": "unmask, ID3 with a stride of 100",
}
EXTRA = {
    "lora": "peft",
    "shira": "peft",
    "super": "peft",
    "authors": "selective_optimizers",
}  # the package that a row needs beside the core
ADAPTED = ("lora", "shira", "super")  # rows with adapters of peft's
DENSE = ("full", "full-fused", "authors")  # rows that hold a gradient and two moments for every weight
_LONGEST_CYCLE = 10


@dataclass(frozen=True)
class Row:
    """One method of a benchmark.

    Attributes:
        label: As the user wrote it: ``"static"``, ``"static@10000"``.
        kind: A key of `KINDS`, or ``"id3-K"`` for any stride K.
        budget: B, in scalar weights; what it means for a peer is said in `KINDS`.
    """

    label: str
    kind: str
    budget: int

    @property
    def stride(self) -> int:
        """The stride of an ID3 row; 1 for every other."""
        return int(self.kind.removeprefix("id3-")) if self.kind.startswith("id3-") else 1

    @property
    def cycle(self) -> int:
        """Steps of one timed cycle: the stride, or 4 (one that selects, three that do not) where that is above 10."""
        return self.stride if self.stride <= _LONGEST_CYCLE else 4

    @property
    def what(self) -> str:
        """The row in one line."""
        return KINDS.get(self.kind, f"unmask, ID3 with a stride of {self.stride}")


def parse_rows(text: str, budget: int) -> list[Row]:
    """Rows from a comma-separated list; ``all`` stands for every kind, ``NAME@BUDGET`` for a budget of its own.

    Raises:
        ConfigError: An unknown method, a budget that is no count, or the same row twice.

    Example:
        >>> [(row.label, row.budget) for row in parse_rows("frozen,static@100", 20)]
        [('frozen', 20), ('static@100', 100)]
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    labels = [name for word in words for name in (KINDS if word == "all" else (word,))]
    if not labels:
        raise ConfigError("methods is empty; give names, comma-separated, or 'all'.")
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ConfigError(f"methods names {', '.join(repeated)} more than once; name each row once.")
    return [_row(label, budget) for label in labels]


def _row(label: str, budget: int) -> Row:
    kind, at, own = label.partition("@")
    if kind not in KINDS and not re.fullmatch(r"id3-([2-9]|[1-9]\d+)", kind):
        raise ConfigError(f"unknown method {kind!r}; there are {', '.join(KINDS)}, id3-K for a stride of K, and all.")
    if at and not (own.isdigit() and int(own) > 0):
        raise ConfigError(f"method {label!r}: the budget after @ must be a count of weights, e.g. {kind}@10000.")
    return Row(label, kind, int(own) if at else budget)
