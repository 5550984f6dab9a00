"""Which rows are in memory together: all of them if they fit, else groups that each hold the reference row too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unmask.lab.bench.rows import DENSE, Row
from unmask.lab.bench.stats import REFERENCE

SHARE = 0.7  # of the free memory, unless told otherwise: an estimate is no promise
_GRADIENT, _MOMENTS, _MASK = 1, 2, 0.25  # in multiples of float32 weights
_PER_TOKEN = 34  # activations of a transformer layer: 34 hidden values a token, and 5 length per head, at 2 bytes
_ADAPTED = 2.0  # adapters keep about as much again (they save their inputs, dropout, sums)


def row_bytes(row: Row, weights: int) -> int:
    """What a row holds between its steps: its weights, and for dense rows two moments (and masks).

    Args:
        row: The row.
        weights: Bytes of the model's weights.
    """
    extra = (_MOMENTS if row.kind in DENSE else 0) + (_MASK if row.kind == "authors" else 0)
    return int(weights * (1 + extra)) + 40 * row.budget


def step_bytes(described: Mapping[str, Any], weights: int, config: Any, itemsize: int, adapted: bool = True) -> int:
    """What a row needs during a step: activations (arXiv 2205.05198, eq. 2), logits and a dense gradient.

    Args:
        described: The model and its batch, see `Blueprint.describe`.
        weights: Bytes of the model's weights.
        config: The model's config.
        itemsize: Bytes of a value.
        adapted: The row has adapters of peft's; so it is for the greediest row.
    """
    hidden, layers, heads, vocab = (
        int(getattr(config, name, 0) or 0)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    )
    tokens = described["tokens"]
    activations = tokens * layers * (_PER_TOKEN * hidden + 5 * heads * described["seq_len"]) * itemsize / 2
    logits = 4 * tokens * vocab * itemsize if described["class"].endswith("CausalLM") else 0
    return int((_ADAPTED if adapted else 1) * activations + logits + _GRADIENT * weights)


def plan_groups(
    held: Mapping[str, int], step: int, free: int | None, isolate: bool = False, share: float = SHARE
) -> list[list[str]]:
    """Rows that run interleaved, in order, each group with the reference row first if there is one.

    Args:
        held: Bytes that each row holds, by label.
        step: Bytes that a step needs beside; one row steps at a time.
        free: Free memory in bytes; None if unknown, which is taken for enough.
        isolate: One row (and the reference) at a time, whatever fits.
        share: How much of the free memory the rows of a group may fill by their estimate.

    Example:
        >>> plan_groups({"frozen": 4, "a": 4, "b": 4}, step=2, free=16)
        [['frozen', 'a'], ['frozen', 'b']]
    """
    room = float("inf") if free is None else share * free - step
    if not isolate and sum(held.values()) <= room:
        return [list(held)]
    shared = [label for label in held if label == REFERENCE]
    base = sum(held[label] for label in shared)
    groups: list[list[str]] = []
    filled = float("inf")
    for label in [label for label in held if label != REFERENCE]:
        if isolate or filled + held[label] > room:
            groups.append(list(shared))
            filled = base
        groups[-1].append(label)
        filled += held[label]
    return groups or [shared]


def too_large(labels: Sequence[str], held: Mapping[str, int], step: int, free: int | None) -> str | None:
    """Why these rows cannot run together at all, if they cannot."""
    needed = sum(held[label] for label in labels) + step
    if free is None or needed <= free:
        return None
    return f"needs about {needed / 2**30:.1f} GiB (with the reference row beside it), {free / 2**30:.1f} GiB are free"
