"""``unmask inspect``: shows what a delta holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unmask.analysis import allocation, grouped, mask_of, snapshots, sparsity_entropy, tensor_sparsity
from unmask.analysis.mask import Mask, orders
from unmask.delta.delta import SparseDelta
from unmask.delta.file import parts_of
from unmask.delta.provenance import Provenance
from unmask.errors import DeltaError
from unmask.files import check_file
from unmask.methods.naming import layer_of, without_layer


def run_inspect(path: Path, top: int, as_json: bool, plot: Path | None = None) -> None:
    """Prints a delta's tables, or all of it as JSON, and draws it if there is a path for that."""
    if plot is not None:
        from unmask.lab.figures import delta_figure, figure_files, write_figure

        for file in figure_files(plot):
            check_file(file, "--plot")
    delta = SparseDelta.load(path)
    facts = describe(delta, path)
    if plot is not None:
        if not len(delta):
            raise DeltaError("this delta holds whole tensors only, so there is no allocation to draw.")
        along = snapshots(delta, 10) if orders(delta) and facts["tensor_sparsity"] is not None else []
        for written in write_figure(lambda style: delta_figure({**facts, "along": along}, style), plot):
            print(f"written: {written}", file=sys.stderr)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts, top)


def _print(facts: dict[str, Any], top: int) -> None:
    """Prints size, method and base, what the delta was trained inside of, how its weights spread, and the tables."""
    console = Console(highlight=False)
    said = Provenance.from_json(facts["metadata"])
    method, step = said.method or {}, "?" if said.step is None else said.step
    used, budget = ("?" if count is None else count for count in (said.used, said.budget))
    kept = method.get("leaving") == "kept"  # then more weights were tuned than the budget has
    words = f"{used} tuned at a budget of {budget} a step" if kept else f"{used} of a budget of {budget} used"
    console.print(
        f"{facts['file']}: {facts['weights']:,} weights in {facts['bytes']:,} bytes ({facts['bytes_per_weight']} bytes each)\n"
        f"{_parts_line(facts)}\n"
        f"method {method.get('name', '?')} {method.get('parameters', {})}, {words} after {step} steps\n"
        f"base {said.base_id!r} ({said.parameters or 0:,} parameters), fingerprint {facts['base'][:23]}..."
    )
    if said.into:
        settings = ", ".join(f"{key} {value}" for key, value in said.into.items() if key != "kind")
        console.print(f"inside {said.into['kind']} ({settings})")
    if facts["weights"]:
        of = "" if facts["eligible"] is None else f" of {facts['eligible']['tensors']}"
        sparsity = "" if facts["tensor_sparsity"] is None else f" (tensor sparsity {facts['tensor_sparsity']:.1%})"
        console.print(
            f"in {len(facts['tensors'])}{of} tensors{sparsity}; sparsity entropy {facts['sparsity_entropy']:.3f} nats of the "
            f"densities, {facts['sparsity_entropy_share']:.3f} of the shares"
        )
    console.print("'of' counts the weights of the tensors that changed")
    for title, key in (("by layer", "layer"), ("by module kind", "kind"), ("by tensor", "tensor")):
        table = Table(title=title, title_justify="left")
        table.add_column(key)
        for column in ("changed", "of", "density"):
            table.add_column(column, justify="right")
        rows = sorted(facts[f"{key}s"].items(), key=lambda item: -item[1]["changed"])
        for name, row in rows[:top]:
            table.add_row(name, f"{row['changed']:,}", f"{row['of']:,}", f"{row['density']:.4%}")
        if len(rows) > top:
            table.add_row(f"({len(rows) - top} more)", "", "", "")
        console.print(table)
    under = facts["initial"]
    if under:
        console.print(
            f"initial values of {len(under)} tensors that the base lacks, under what was trained of them: "
            f"{sum(facts['whole'][name] for name in under):,}"
        )
    alone = {name: count for name, count in facts["whole"].items() if name not in under}
    if alone:
        console.print("stored whole: " + ", ".join(f"{name} ({count:,})" for name, count in alone.items()))


def _parts_line(facts: dict[str, Any]) -> str:
    """Returns the line that says what each part of a delta's file takes, and how it stores indices."""
    parts, seed = facts["parts"], facts["seed"]
    bits = 8 * parts["indices"] / max(1, facts["weights"])
    indices = f"at {bits:.2f} bits each" if seed is None else f"drawn again from seed {seed}"
    return f"format {facts['format']}, indices {indices}; bytes: " + ", ".join(
        f"{k} {n:,}" for k, n in parts.items() if n
    )


def describe(delta: SparseDelta, path: Path) -> dict[str, Any]:
    """Returns a delta as JSON values: counts by layer, kind and tensor, sizes, and provenance."""
    size = path.stat().st_size
    version, parts = parts_of(path)
    mask = mask_of(delta) if len(delta) else Mask({}, {}, None, None)
    return {
        "file": str(path),
        "bytes": size,
        "format": version,
        "parts": parts,
        "seed": None if delta.draw is None else delta.draw.seed,
        "weights": len(delta),
        "bytes_per_weight": round(size / max(1, len(delta) + delta.whole_numel), 2),
        "tensor_sparsity": None if mask.tensors is None else tensor_sparsity(mask),
        "sparsity_entropy": sparsity_entropy(mask),
        "sparsity_entropy_share": sparsity_entropy(mask, of="share"),
        "eligible": delta.provenance.eligible,
        "layers": grouped(mask, lambda name: layer_of(name) or "outside layers"),
        "kinds": grouped(mask, without_layer),
        "tensors": grouped(mask, lambda name: name),
        "allocation": allocation(mask),
        "whole": {name: tensor.numel() for name, tensor in delta.whole.items()},
        "initial": delta.overlaid,
        "base": delta.base,
        "metadata": dict(delta.metadata),
    }
