"""The adapter's section of a model card: what was trained, on which base, and how much of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

_BEGIN, _END = "<!-- unmask: begin -->", "<!-- unmask: end -->"
_NEW = "---\nlibrary_name: peft\n---\n"


def write_card(folder: str, record: Mapping[str, Any]) -> Path:
    """Writes the section into the folder's ``README.md``, in the place of an earlier one; the rest is left as it is."""
    path = Path(folder, "README.md")
    text = path.read_text(encoding="utf-8") if path.is_file() else _NEW
    before, found, after = text.partition(_BEGIN)
    if found:
        after = after.partition(_END)[2]
    card = f"{before.rstrip()}\n\n{_BEGIN}\n{section(record)}\n{_END}\n{after.lstrip()}"
    path.write_text(card, encoding="utf-8")
    return path


def complete_card(folder: str) -> None:
    """Gives the card of a folder that is about to be uploaded what transformers' own card there lacks.

    That is PEFT's metadata (library and base), and the section of the adapter in that folder; adapters in folders inside
    have cards of their own.
    """
    path, config = Path(folder, "README.md"), Path(folder, "adapter_config.json")
    if not config.is_file():
        return
    card, saved = ModelCard.load(path), json.loads(config.read_text(encoding="utf-8"))
    card.data.library_name = "peft"
    if saved["base_model_name_or_path"]:
        card.data.base_model = saved["base_model_name_or_path"]
    card.save(path)
    if saved["record"] is not None:
        write_card(folder, saved["record"])


def section(record: Mapping[str, Any]) -> str:
    """The section's Markdown.

    Example:
        >>> record = {"method": {"name": "pafi", "parameters": {}, "steps": 1}, "budget": 5, "used": 5, "step": 9,
        ...           "whole": 0, "parameters": 100, "base_id": "a/b", "fingerprint": "sha256:0", "dense": []}
        >>> section(record).splitlines()[4]
        '| base model | `a/b` |'
    """
    share = record["used"] / max(1, record["parameters"])
    rows = {
        "base model": f"`{record['base_id'] or 'not known'}`",
        "base's fingerprint": f"`{record['fingerprint']}`",
        "method": _method(record["method"]),
        "budget": f"{record['budget']:,} single weights",
        "selected": f"{record['used']:,} of {record['parameters']:,} weights ({share:.4%})",
        "stored whole, outside the budget": f"{record['whole']:,} numbers" + _names(record["dense"]),
        "optimizer steps": f"{record['step']:,}",
    }
    lines = [
        "## Selective fine-tuning",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {text} |" for key, text in rows.items()),
    ]
    return "\n".join([*lines, "", _USE])


_USE = """The adapter holds the trained values of single weights (arXiv 2408.14470), not differences. It fits the base with this
fingerprint bit for bit, and no other. To load it: `import unmask.peft`, then `peft.PeftModel.from_pretrained` as usual."""


def _method(method: Mapping[str, Any]) -> str:
    settings = {**method["parameters"], "steps": method["steps"]}
    return f"{method['name']} (" + ", ".join(f"{name} {value}" for name, value in settings.items()) + ")"


def _names(names: list[str]) -> str:
    return f" ({', '.join(f'`{name}`' for name in names)})" if names else ""
