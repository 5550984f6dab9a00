"""``unmask eval``: base + delta on a task, or the base alone on what needs no trained head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unmask.delta.delta import SparseDelta
from unmask.errors import ConfigError
from unmask.files import check_folder
from unmask.lab.models import load_base, load_tuned, on_accelerator, task_of
from unmask.lab.tasks.names import TASKS
from unmask.lab.tasks.protocol import Request
from unmask.lab.tasks.registry import kind_of
from unmask.lab.training.setup import in_words


def run_eval(source: str, delta_path: Path | None, request: Request, batch_size: int) -> None:
    """Prints the metrics of each evaluation split."""
    if request.output is not None:
        check_folder(request.output, "--output")
    delta = None if delta_path is None else SparseDelta.load(delta_path)
    if delta is None:
        name = (request.task or "").split(",")[0].strip()
        if TASKS.get(name) != "generation":
            able = ", ".join(task for task, kind in TASKS.items() if kind == "generation")
            raise ConfigError(
                f"give a delta: without one, only word problems can be evaluated (--task with some of {able})."
            )
        described: Mapping[str, Any] = {"kind": "generation", "name": name}
    else:
        described = task_of(delta)
    own = {"limit": "--limit", "output": "--output", "options": "--set", "overwrite": "--overwrite"}
    names = [option for name, option in own.items() if getattr(request, name)]
    if names and kind_of(described).head != "generation":
        raise ConfigError(f"{', '.join(names)}: for word problems only; {described['name']!r} has no use for it.")
    request = replace(request, model=source, delta=None if delta_path is None else str(delta_path))
    task = kind_of(described).reload(described, request)
    if delta is None:
        model, tokenizer, _ = load_base(source, None, 0, kind_of(described).head)
    else:
        model, tokenizer = load_tuned(source, delta)
    for scored in task.score(on_accelerator(model.eval()), tokenizer, described, batch_size):
        print(f"{scored.split} ({scored.count:,}): {in_words(scored.metrics)}", flush=True)
