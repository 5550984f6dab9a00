"""Measures the size of deltas, and the time to code indices.

    python benchmarks/deltas.py

The first table has the bytes a weight of a delta's file, header and provenance included, for models that are built from a
config, without weights. The mask is random, which is the hardest to code. "coded" stores its indices, "seeded" its seed. The
second table has the seconds of processor time, the least of some repeats, for 7M indices in the 226 matrices of Llama-7B (6.7e9
weights) on one core.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import unmask
from unmask.delta.delta import SparseDelta
from unmask.delta.drawn import Draw
from unmask.delta.provenance import provenance_of
from unmask.delta.record import record_delta
from unmask.delta.rice import decode, encode
from unmask.lab.bench.models import blueprint
from unmask.lab.bench.settings import BenchSettings
from unmask.methods.draw import draw
from unmask.quantised.layers import weights
from unmask.ranking.ledger import Layout, Slots

LLAMA_7B = [(32000, 4096)] * 2 + ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32


def random_delta(model: str, dtype: torch.dtype, share: float) -> SparseDelta:
    """Returns the delta of a random mask over all weights of a model that is built on the meta device."""
    plan = blueprint(BenchSettings(model=model))
    plan.device, plan.dtype = torch.device("meta"), dtype
    net = plan.build()
    named = dict(sorted(weights(net).items()))
    layout = Layout(list(named), list(named.values()))
    budget = round(share * layout.total)
    method = unmask.random_mask(budget)
    positions = torch.from_numpy(draw(budget, layout.total, 0))
    slots = Slots(positions, torch.zeros(budget), torch.randn(budget), budget, 1000)
    provenance = provenance_of(
        net,
        method,
        layout,
        budget=budget,
        used=budget,
        step=1000,
        dense=[],
        base_id=f"some-hub/{model}",
        parameters=layout.total,
    )
    fingerprint = "sha256:" + "0123456789abcdef" * 4
    return replace(record_delta(layout, slots, {}, fingerprint, provenance), places=fingerprint)


def bytes_a_weight(delta: SparseDelta, compress: bool = True) -> float:
    """Returns the size of a delta's file, divided by its weights."""
    with tempfile.TemporaryDirectory() as folder:
        return delta.save(Path(folder, "delta.safetensors"), compress).stat().st_size / len(delta)


def least_seconds(function: Callable[[], object], repeats: int) -> float:
    """Returns the least processor time of some calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.002)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print("| model | dtype | weights | changed | plain | coded | seeded |\n|---|---|---:|---:|---:|---:|---:|")
    for model in ("mpnet", "smollm2"):
        for dtype in (torch.bfloat16, torch.float32):
            delta = random_delta(model, dtype, given.share)
            sizes = (bytes_a_weight(delta, False), bytes_a_weight(replace(delta, draw=None)), bytes_a_weight(delta))
            total = delta.provenance.parameters or 0
            words = " | ".join(f"{size:.3f}" for size in sizes)
            print(f"| {model} | {str(dtype).removeprefix('torch.')} | {total:,} | {len(delta):,} | {words} |")
    sizes = [math.prod(shape) for shape in LLAMA_7B]
    starts, total = np.cumsum([0, *sizes]), sum(sizes)
    positions = np.sort(draw(7_000_000, total, 0))
    edges = np.searchsorted(positions, starts)
    parts = [positions[low:high] - start for low, high, start in zip(edges, edges[1:], starts, strict=False)]
    codes = [encode(part, size) for part, size in zip(parts, sizes, strict=True)]
    known = Draw(0, total, {f"{place:03}": int(start) for place, start in enumerate(starts[:-1])})
    works = {
        "encode": lambda: [encode(part, size) for part, size in zip(parts, sizes, strict=True)],
        "decode": lambda: [decode(*c, part.size, size) for c, part, size in zip(codes, parts, sizes, strict=True)],
        "draw from the seed": lambda: known.indices(7_000_000, list(known.starts)),
    }
    bits = 8 * sum(code.size for code, _ in codes) / positions.size
    print(
        f"\n7,000,000 of {total:,} weights in {len(sizes)} tensors: {bits:.2f} bits an index\n\n| | seconds |\n|---|---:|"
    )
    for name, work in works.items():
        print(f"| {name} | {least_seconds(work, given.repeats):.2f} |")


if __name__ == "__main__":
    main()
