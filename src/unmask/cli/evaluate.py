"""``unmask eval``: base + delta on a task."""

from __future__ import annotations

from pathlib import Path

from unmask.delta import SparseDelta
from unmask.kinds import Request, kind_of
from unmask.modeling import load_tuned, task_of


def run_eval(source: str, delta_path: Path, request: Request, batch_size: int) -> None:
    """Prints the metrics of each evaluation split."""
    delta = SparseDelta.load(delta_path)
    described = task_of(delta)
    task = kind_of(described).reload(described, request)
    model, tokenizer = load_tuned(source, delta)
    for scored in task.score(model, tokenizer, described, batch_size):
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in scored.metrics.items())
        print(f"{scored.split} ({scored.count:,}): {metrics}", flush=True)
