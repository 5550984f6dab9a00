"""``unmask diff``: writes the delta between two checkpoints, and says how large it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.delta.delta import SparseDelta
from unmask.errors import ConfigError
from unmask.files import check_file


def run_diff(base: str, tuned: str, output: Path) -> None:
    """Writes the delta to a new file, and prints what changed, the density, and the size next to a dense copy's."""
    check_file(output, "--output")
    if output.exists():
        raise ConfigError(f"{str(output)!r} exists already; give another --output.")
    delta = SparseDelta.between(base, tuned)
    size = delta.save(output).stat().st_size
    print(*described(delta, delta.metadata["between"], size), f"delta: {output}", sep="\n")


def described(delta: SparseDelta, made: Mapping[str, Any], size: int) -> list[str]:
    """Returns what is printed of a delta between two checkpoints, whose file has ``size`` bytes, as lines."""
    apart = {*made["added"], *made["replaced"]}
    whole = len(delta.whole.keys() - apart)
    lines = [
        f"tensors: {len(delta.sparse) + whole:,} of {made['tensors']:,} changed ({len(delta.sparse):,} held in part, {whole:,} "
        "whole)"
    ]
    for kind in ("added", "removed", "replaced", "tied"):
        names = list(made[kind])
        if names:
            lines.append(f"{kind}: {len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    lines.append(
        f"weights: {len(delta):,} of {made['weights']:,} held one by one (density {len(delta) / max(1, made['weights']):.4%}), "
        f"{delta.whole_numel:,} in whole tensors"
    )
    lines.append(f"size: {size:,} bytes; a dense copy has {made['bytes']:,} ({size / max(1, made['bytes']):.2%})")
    if size >= made["bytes"]:
        lines.append("note: a dense copy is smaller than this delta; keep the tuned checkpoint instead.")
    if not any((delta.sparse, delta.whole, made["removed"], made["tied"])):
        lines.append("note: the two checkpoints hold the same tensors, bit for bit.")
    return lines
