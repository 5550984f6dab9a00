"""Trains with every method on SST-2 with MiniLM at one budget, for the table of docs/results.md.

    python experiments/sst2_methods.py --data-dir GLUE_FOLDER [--model FOLDER] [--output runs/sst2] [--steps 250]

Each method runs at the learning rates of its row below (written down before any run), with the same steps, batches and
seed, a dense classifier outside the budget, and is reported at the better rate by final dev loss. Finished runs are kept
and skipped, so the command can be stopped and started again. The table is printed, and written next to the runs.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from unmask.lab.training.demo_data import fetch_demo_model
from unmask.lab.training.settings import build
from unmask.lab.training.training import train

RATES = {
    "full": (5e-5, 2e-4),
    "id3": (1e-3, 3e-3),
    "static_d3": (1e-3, 3e-3),
    "repeat_d3": (1e-3, 3e-3),
    "repeat_d3_every_50": (1e-3, 3e-3),
    "fish": (1e-3, 3e-3),
    "pafi": (3e-3, 1e-2),
    "bitfit": (3e-3, 1e-2),
    "random_mask": (1e-2, 3e-2),
}
BUDGET = 20_000
STRIDE = {"repeat_d3_every_50": 50}  # added after the plain repeat_d3 had been seen not to learn


def run(method: str, lr: float, arguments: argparse.Namespace, model: str) -> dict:
    output = Path(arguments.output, f"{method}-{lr:g}")
    summary = output / "summary.json"
    if not summary.is_file():
        settings = {
            "model": model,
            "task": "sst2",
            "data_dir": arguments.data_dir,
            "method": "repeat_d3" if method in STRIDE else method,
            "stride": STRIDE.get(method, 1),
            "budget": None if method == "full" else BUDGET,
            "lr": lr,
            "max_steps": arguments.steps,
            "batch_size": 16,
            "max_length": 64,
            "bf16": True,
            "seed": arguments.seed,
            "eval_steps": arguments.steps,
            "output": str(output),
        }
        train(build(settings), overwrite=True)
    return json.loads(summary.read_text())


def table(rows: dict[str, list[dict]]) -> str:
    lines = [
        "| method | weights trained | dense head | learning rate (of) | dev loss | dev accuracy | delta, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    best = {method: min(runs, key=lambda r: r["after"]["loss"]) for method, runs in rows.items()}
    for method, r in sorted(best.items(), key=lambda item: item[1]["after"]["loss"]):
        rates = ", ".join(f"{s['lr']:g}: {s['after']['loss']:.3f}" for s in rows[method])
        lines.append(
            f"| {method} | {r['used']:,} | {r['dense']:,} | {r['lr']:g} ({rates}) | {r['after']['loss']:.3f} | "
            f"{r['after']['accuracy']:.4f} | {r['delta_bytes']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", help="default: the demo's MiniLM")
    parser.add_argument("--output", default="runs/sst2")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES), help="to share the work out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = arguments.model or str(fetch_demo_model())
    rows = {method: [run(method, lr, arguments, model) for lr in RATES[method]] for method in arguments.methods}
    text = table(rows) + f"\n\ntorch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    Path(arguments.output, "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
