"""Shows where a step's time goes: torch's profiler over some rows of the benchmark, operator by operator, side by side.

    python benchmarks/operators.py OUT --methods frozen,static,full --steps 4
    python benchmarks/operators.py OUT --methods frozen,lora,id3-10 --dtype autocast

Each row runs in a fresh process, on the same model and batches. Times are the operators' own, without the operators that they
call, in milliseconds a step. "between operators" is the step's wall time less their sum: Python, the bookkeeping of autograd
and the optimizer. Profiling itself costs a little, so quote the ratios of benchmark runs and not these. The script writes
OUT/operators.json (for another dtype than float32 OUT/operators-DTYPE.json) and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from unmask.lab.bench.contenders import build
from unmask.lab.bench.models import blueprint
from unmask.lab.bench.rows import Row
from unmask.lab.bench.run import describe_machine
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.worker import start

BETWEEN = "between operators"


def profiled(settings: BenchSettings, row: Row) -> dict[str, float]:
    """Returns a row's milliseconds per step in each operator and between the operators."""
    torch.set_num_threads(settings.threads)
    plan = blueprint(settings)
    contender, batches, autocast = build(row, plan, settings), plan.batches(), settings.dtype == "autocast"
    start(contender, batches, settings)  # The masks are in place after it.
    steps = row.cycle * row.cycles(settings.steps)
    gc.collect()
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        begin = time.perf_counter()
        for i in range(steps):
            contender.step(batches[i % len(batches)], autocast)
        wall = time.perf_counter() - begin
    own = {event.key: event.self_cpu_time_total / 1e3 / steps for event in seen.key_averages()}
    return {**own, BETWEEN: 1e3 * wall / steps - sum(own.values()), "step": 1e3 * wall / steps}


def table(rows: dict[str, dict[str, float]], most: int) -> str:
    """Returns the operators that take most in any row, the largest first, and the sum of the others, as Markdown."""
    keys = {key for row in rows.values() for key in row} - {BETWEEN, "step"}
    ranked = sorted(keys, key=lambda key: -max(row.get(key, 0.0) for row in rows.values()))
    lines = [["operator, ms a step", *rows], ["---", *("---:" for _ in rows)]]
    lines += [[f"`{key}`", *(f"{row.get(key, 0.0):,.0f}" for row in rows.values())] for key in ranked[:most]]
    rest = [sum(row.get(key, 0.0) for key in ranked[most:]) for row in rows.values()]
    lines.append(["all other operators", *(f"{value:,.0f}" for value in rest)])
    lines += [[key, *(f"{row[key]:,.0f}" for row in rows.values())] for key in (BETWEEN, "step")]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Profiles the rows that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--methods", default="frozen,static,full")
    parser.add_argument("--model", default="roberta-base")
    parser.add_argument("--dtype", default="float32", help="float32, autocast or bf16")
    parser.add_argument("--steps", type=int, default=4, help="profiled steps of a row without a stride")
    parser.add_argument("--most", type=int, default=14, help="how many operators get a line each")
    given = parser.parse_args()
    settings = BenchSettings(
        model=given.model, methods=given.methods, dtype=given.dtype, steps=given.steps, device="cpu"
    )
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = {row.label: pool.submit(profiled, settings, row).result() for row in settings.rows()}
    out = Path(given.output)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python benchmarks/operators.py {' '.join(sys.argv[1:])}",
        "machine": describe_machine(torch.device("cpu"), settings.threads),
        "settings": dataclasses.asdict(settings),
        "rows": rows,
        "table": table(rows, given.most),
    }
    name = "operators" if given.dtype == "float32" else f"operators-{given.dtype}"
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record["table"])


if __name__ == "__main__":
    main()
