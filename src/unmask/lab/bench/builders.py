"""From a row to its contender, or to the reason why it has none."""

from __future__ import annotations

import importlib.util

from unmask.lab.bench.contender import Contender
from unmask.lab.bench.models import Blueprint
from unmask.lab.bench.ours import build_ours
from unmask.lab.bench.peers import build_authors, build_frozen, build_full, build_lora, build_shira, build_super
from unmask.lab.bench.rows import EXTRA, Row
from unmask.lab.bench.settings import BenchSettings

_PEERS = {
    "frozen": build_frozen,
    "full": build_full,
    "full-fused": build_full,
    "shira": build_shira,
    "super": build_super,
    "authors": build_authors,
}


def build(row: Row, plan: Blueprint, settings: BenchSettings, cycles: int, ramp: int = 0) -> Contender:
    """The row's model and optimizer.

    Args:
        row: What to build.
        plan: The model.
        settings: The run.
        cycles: How many cycles it will run, warm-up included.
        ramp: Steps before those in which an ID3 row unmasks half of its budget; 0: it does so at its first step.

    Raises:
        MissingExtraError: The row's package is not installed; `missing` tells beforehand.
    """
    if row.kind == "lora":
        return build_lora(row, plan, settings.lora_r)
    if row.kind in _PEERS:
        return _PEERS[row.kind](row, plan)
    return build_ours(row, plan, cycles, ramp)


def missing(row: Row) -> str | None:
    """What to install for a row whose package is not there."""
    package = EXTRA.get(row.kind)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return "not installed: pip install 'unmask[bench]'"
