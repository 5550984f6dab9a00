"""Measures where the dense product of a weight gradient beats the sampled one, and how well `choose` chooses.

    python benchmarks/crossover.py --threads 2 --output crossover.json

For each weight's shape, number of tokens, dtype, density and pattern (random; or all entries in 16 rows, as gradients tend
to have them) it times the dense product, the product of the rows and columns in use ("compact") and the sampled product,
and prints the cost model's choice with what it loses against the best of the three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from unmask.gradients.choice import choose
from unmask.gradients.entries import Entries
from unmask.gradients.sampled import sampled_product

SHAPES = [(384, 384), (1536, 384), (768, 768), (3072, 768), (768, 3072), (2048, 2048)]
DENSITIES = [0.0005, 0.002, 0.005, 0.02, 0.05, 0.1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def entries(rows: int, columns: int, density: float, pattern: str, device: str) -> Entries:
    """Returns the entries of a pattern: random ones, or all in 16 rows."""
    count = max(1, int(density * rows * columns))
    room = rows * columns if pattern == "random" else max(min(rows, 16) * columns, count)
    flat = torch.randperm(room, generator=torch.Generator().manual_seed(0))[:count].sort().values.to(device)
    return Entries((rows, columns), flat, flat)


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Returns the median time of some calls, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(shape: tuple[int, int], tokens: int, dtype: str, device: str, repeats: int) -> list[dict]:
    """Times the products of one shape, for each pattern and density."""
    rows, columns = shape
    g = torch.randn(tokens, rows, device=device).to(DTYPES[dtype])
    x = torch.randn(tokens, columns, device=device).to(DTYPES[dtype])
    dense = seconds(lambda: g.t() @ x, device, repeats)
    results = []
    for pattern in ("random", "rows"):
        for density in DENSITIES:
            wanted = entries(rows, columns, density, pattern, device)
            times = {"dense": dense}
            for how in ("compact", "sampled"):
                times[how] = seconds(lambda how=how, wanted=wanted: sampled_product(g, x, wanted, how), device, repeats)
            chosen = choose(wanted, tokens, g.dtype, g.device)
            results.append(
                {
                    "rows": rows, "columns": columns, "tokens": tokens, "dtype": dtype, "pattern": pattern,
                    "density": density, **{f"{how}_ms": 1e3 * value for how, value in times.items()}, "chosen": chosen,
                    "loss": times[chosen] / min(times.values()),
                }
            )  # fmt: skip
    return results


def show(row: dict) -> None:
    """Prints a case as one line."""
    times = "  ".join(f"{how} {row[f'{how}_ms']:8.2f}" for how in ("dense", "compact", "sampled") if f"{how}_ms" in row)
    place = f"{row['rows']:5} x {row['columns']:5} T {row['tokens']:5} {row['dtype']:8} {row['pattern']:6} {row['density']:7.2%}"
    print(f"{place}  {times} ms  -> {row['chosen']:8} {row['loss']:5.2f} x the best", flush=True)


def main() -> None:
    """Measures every case that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for tokens in options.tokens:
        for dtype in DTYPES:
            for shape in SHAPES:
                rows += measure(shape, tokens, dtype, options.device, options.repeats)
                for row in rows[-2 * len(DENSITIES) :]:
                    show(row)
    losses = [row["loss"] for row in rows]
    average, worst = statistics.mean(losses), max(losses)
    print(f"{len(rows)} cases: the choice takes on average {average:.2f} x the best time, at worst {worst:.2f}.")
    if options.output:
        report = {"torch": torch.__version__, "threads": options.threads, "device": options.device, "rows": rows}
        options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
