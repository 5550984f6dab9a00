"""Where a step's time goes: torch's profiler over some rows of the benchmark, operator by operator, side by side.

    python benchmarks/operators.py OUT --methods frozen,static,full --steps 4
    python benchmarks/operators.py OUT --methods frozen,lora,id3-10 --dtype autocast

Each row runs in turn in this process, on the same model and batches; the heap keeps what was freed. Times are the operators' own
(without the operators that they call), in milliseconds a step; "between operators" is the step's wall time less their sum:
Python, autograd's bookkeeping, the optimizer's. Profiling itself costs a little, so the ratios of benchmark runs are the ones to
quote. Writes OUT/operators.json (for another dtype than float32 OUT/operators-DTYPE.json) and prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from unmask.lab.bench.heap import keep_freed_memory
from unmask.lab.bench.lanes import LocalLane
from unmask.lab.bench.machine import describe_machine
from unmask.lab.bench.models import blueprint
from unmask.lab.bench.quiet import import_peers, quiet_torch
from unmask.lab.bench.settings import BenchSettings

BETWEEN = "between operators"


def profiled(lane: LocalLane) -> dict[str, float]:
    """Milliseconds a step of each operator of one row, and of what lies between them."""
    lane.stretch(0, 0)  # masks and the heap are in place after it
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        steps = len(lane.stretch(0, 1))
        wall = time.perf_counter() - start
    own = {event.key: event.self_cpu_time_total / 1e3 / steps for event in seen.key_averages()}
    return {**own, BETWEEN: 1e3 * wall / steps - sum(own.values()), "step": 1e3 * wall / steps}


def table(rows: dict[str, dict[str, float]], most: int) -> str:
    """The operators that take most in any row, largest first, the rest summed."""
    keys = {key for row in rows.values() for key in row} - {BETWEEN, "step"}
    ranked = sorted(keys, key=lambda key: -max(row.get(key, 0.0) for row in rows.values()))
    lines = [["operator, ms a step", *rows], ["---", *("---:" for _ in rows)]]
    lines += [[f"`{key}`", *(f"{row.get(key, 0.0):,.0f}" for row in rows.values())] for key in ranked[:most]]
    rest = [sum(row.get(key, 0.0) for key in ranked[most:]) for row in rows.values()]
    lines.append(["all other operators", *(f"{value:,.0f}" for value in rest)])
    lines += [[key, *(f"{row[key]:,.0f}" for row in rows.values())] for key in (BETWEEN, "step")]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--methods", default="frozen,static,full")
    parser.add_argument("--model", default="roberta-base")
    parser.add_argument("--dtype", default="float32", help="float32, autocast or bf16")
    parser.add_argument("--steps", type=int, default=4, help="profiled steps of a row without a stride")
    parser.add_argument("--most", type=int, default=14, help="operators with a line of their own")
    given = parser.parse_args()
    settings = BenchSettings(
        model=given.model, methods=given.methods, dtype=given.dtype, steps=given.steps, rounds=1, device="cpu"
    )
    import_peers()
    keep_freed_memory()
    with quiet_torch(settings.threads):
        plan = blueprint(settings)
        batches = plan.batches()
        rows = {row.label: profiled(LocalLane(row, plan, batches, settings)) for row in settings.rows()}
    out = Path(given.output)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python benchmarks/operators.py {' '.join(sys.argv[1:])}",
        "machine": describe_machine(torch.device("cpu"), settings.threads),
        "settings": settings.as_json(),
        "rows": rows,
        "table": table(rows, given.most),
    }
    name = "operators" if given.dtype == "float32" else f"operators-{given.dtype}"
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record["table"])


if __name__ == "__main__":
    main()
