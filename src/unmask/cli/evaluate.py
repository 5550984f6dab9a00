"""``unmask eval``: scores base + delta on a task, or a checkpoint with a head of its own, or a base on word problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unmask.delta.delta import SparseDelta
from unmask.errors import ConfigError
from unmask.files import check_folder
from unmask.lab.models import load_base, load_tuned, longest_input, on_accelerator, read_config, task_of
from unmask.lab.tasks.names import TASKS
from unmask.lab.tasks.protocol import Request
from unmask.lab.tasks.registry import kind_of
from unmask.lab.tasks.tags.ner import CUSTOM_NER
from unmask.lab.tasks.text.spec import CUSTOM
from unmask.lab.training.setup import in_words

_LONGEST = 512
"""The longest input in tokens for a checkpoint without a delta, which does not say how it was trained."""


def run_eval(
    source: str, delta_path: Path | None, request: Request, batch_size: int, max_length: int | None = None
) -> None:
    """Prints the metrics of each evaluation split."""
    if request.output is not None:
        check_folder(request.output, "--output")
    delta = None if delta_path is None else SparseDelta.load(delta_path)
    described = _describe(source, request) if delta is None else task_of(delta)
    own = {"limit": "--limit", "output": "--output", "options": "--set", "overwrite": "--overwrite"}
    names = [option for name, option in own.items() if getattr(request, name)]
    solves = kind_of(described).head == "generation"
    if names and not solves:
        raise ConfigError(f"{', '.join(names)}: for word problems only; {described['name']!r} has no use for it.")
    if max_length is not None and solves:
        raise ConfigError("--max-length: not for word problems; give --set max_new_tokens=256.")
    request = replace(request, model=source, delta=None if delta_path is None else str(delta_path))
    task = kind_of(described).reload(described, request)
    for note in task.notes:
        print(f"note: {note}")
    if delta is not None:
        model, tokenizer = load_tuned(source, delta)
    else:
        model, tokenizer, missing = load_base(source, None, 0, kind_of(described).head)
        if missing and not solves:
            raise ConfigError(
                f"{source!r} has no trained head: its checkpoint lacks {missing[0]!r}. Give the delta too, or a checkpoint that "
                "`unmask apply` wrote."
            )
    if not solves:
        length = longest_input(model, tokenizer, max_length or int(described["max_length"]))
        described = {**described, "max_length": length}
    for scored in task.score(on_accelerator(model.eval()), tokenizer, described, batch_size):
        print(f"{scored.split} ({scored.count:,}): {in_words(scored.metrics)}", flush=True)


def _describe(source: str, request: Request) -> Mapping[str, Any]:
    """Describes the task that a checkpoint's own head is for, as a delta's metadata do.

    Raises:
        ConfigError: The request names no data, or the checkpoint has no head for it.
    """
    name = (request.task or "").split(",")[0].strip()
    if TASKS.get(name) == "generation":
        return {"kind": "generation", "name": name}
    if request.task is None and request.data is None:
        raise ConfigError("give the data to evaluate on: --task sst2, say, or --data with a file of your own.")
    config = read_config(source)
    made = (getattr(config, "architectures", None) or ["no architecture"])[0]
    labels = [config.id2label[i] for i in sorted(config.id2label)]
    common = {"num_labels": len(labels), "max_length": _LONGEST}
    if made.endswith("ForSequenceClassification"):
        unnamed = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
        names = None if len(labels) == 1 else [str(i) for i in range(len(labels))] if unnamed else labels
        columns = [request.text or "text", *([request.text_pair] if request.text_pair else [])]
        named = {"label_names": names, "text_columns": columns}
        return {"kind": "sequence", "name": request.task or CUSTOM, **named, **common}
    if made.endswith("ForTokenClassification"):
        types = [label[2:] for label in labels if label.startswith("B-")]
        if labels == ["O", *(f"{place}-{kind}" for kind in types for place in "BI")]:
            return {
                "kind": "token",
                "name": request.task or CUSTOM_NER,
                "types": types,
                "label_names": labels,
                **common,
            }
        raise ConfigError(f"the labels of {source!r} are no tags in IOB2 (O, B-type, I-type): {', '.join(labels)}.")
    raise ConfigError(
        f"{source!r} is a {made}, which has no trained head: give the delta too, or a checkpoint that `unmask apply` wrote. "
        f"Without a head, word problems can be evaluated (--task gsm8k)."
    )
