"""``unmask inspect``: what a delta holds."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unmask.delta import SparseDelta

_LAYER = re.compile(r"\.(?:layer|layers|h|block|blocks)\.(\d+)\.")


def run_inspect(path: Path, top: int, as_json: bool) -> None:
    """Prints a delta's tables, or everything as JSON."""
    delta = SparseDelta.load(path)
    facts = describe(delta, path)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    console.print(_header(facts), highlight=False)
    console.print("'of' counts the weights of the tensors that changed", highlight=False)
    for title, key, rows in (
        ("by layer", "layer", "layers"),
        ("by module kind", "kind", "kinds"),
        ("by tensor", "tensor", "tensors"),
    ):
        console.print(_table(title, key, facts[rows], top))
    under = facts["initial"]
    if under:
        console.print(
            f"initial values of {len(under)} tensors that the base lacks, under what was trained of them: "
            f"{sum(facts['whole'][name] for name in under):,}",
            highlight=False,
        )
    alone = {name: count for name, count in facts["whole"].items() if name not in under}
    if alone:
        console.print(
            "stored whole: " + ", ".join(f"{name} ({count:,})" for name, count in alone.items()), highlight=False
        )


def describe(delta: SparseDelta, path: Path) -> dict[str, Any]:
    """A delta as JSON values: counts by layer, kind and tensor, sizes, provenance."""
    size = path.stat().st_size
    return {
        "file": str(path),
        "bytes": size,
        "weights": len(delta),
        "bytes_per_weight": round(size / max(1, len(delta) + delta.whole_numel), 2),
        "layers": _grouped(delta, lambda name: m.group(1) if (m := _LAYER.search(f".{name}")) else "outside layers"),
        "kinds": _grouped(delta, _kind),
        "tensors": _grouped(delta, lambda name: name),
        "whole": {name: tensor.numel() for name, tensor in delta.whole.items()},
        "initial": delta.overlaid,
        "base": delta.base,
        "metadata": dict(delta.metadata),
    }


def _kind(name: str) -> str:
    """A tensor's name without its layer number, e.g. ``attention.self.query.weight``."""
    match = _LAYER.search(f".{name}")
    return f".{name}"[match.end() :] if match else name


def _grouped(delta: SparseDelta, key: Any) -> dict[str, dict[str, float]]:
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, entry in delta.sparse.items():
        size = 1
        for length in entry.shape:
            size *= length
        counts[key(name)][0] += entry.numel
        counts[key(name)][1] += size
    return {group: {"changed": n, "of": size, "density": n / size} for group, (n, size) in counts.items()}


def _header(facts: dict[str, Any]) -> str:
    meta = facts["metadata"]
    method = meta.get("method", {})
    lines = [
        f"{facts['file']}: {facts['weights']:,} weights in {facts['bytes']:,} bytes ({facts['bytes_per_weight']} bytes each)",
        f"method {method.get('name', '?')} {method.get('parameters', {})}, {meta.get('used', '?')} of a budget of "
        f"{meta.get('budget', '?')} used after {meta.get('step', '?')} steps",
        f"base {meta.get('base_id')!r} ({meta.get('parameters', 0):,} parameters), fingerprint {facts['base'][:23]}...",
    ]
    if meta.get("into"):
        settings = ", ".join(f"{key} {value}" for key, value in meta["into"].items() if key != "kind")
        lines.append(f"inside {meta['into']['kind']} ({settings})")
    return "\n".join(lines)


def _table(title: str, key: str, rows: dict[str, dict[str, float]], top: int) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(key)
    for column in ("changed", "of", "density"):
        table.add_column(column, justify="right")
    ordered = sorted(rows.items(), key=lambda item: -item[1]["changed"])
    for name, row in ordered[:top]:
        table.add_row(name, f"{row['changed']:,}", f"{row['of']:,}", f"{row['density']:.4%}")
    if len(ordered) > top:
        table.add_row(f"({len(ordered) - top} more)", "", "", "")
    return table
