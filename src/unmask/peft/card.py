"""Writes an adapter's section of a model card: what was trained, on which base, and how many weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from unmask.errors import DataError, writing_to
from unmask.files import write_text
from unmask.reading import count, fields, items, mapping, optional, plain, read_json, read_text, refusing, text

_BEGIN, _END = "<!-- unmask: begin -->", "<!-- unmask: end -->"
_NEW = "---\nlibrary_name: peft\n---\n"


def write_card(folder: str, record: Mapping[str, Any]) -> Path:
    """Writes the section into the folder's ``README.md``. It replaces an earlier section; the rest of the file stays."""
    path = Path(folder, "README.md")
    with refusing(DataError, repr(str(path)), "Remove the file, or save it as UTF-8."):
        held = read_text(path) if path.is_file() else _NEW
    before, found, after = held.partition(_BEGIN)
    if found:
        after = after.partition(_END)[2]
    card = f"{before.rstrip()}\n\n{_BEGIN}\n{section(record)}\n{_END}\n{after.lstrip()}"
    with writing_to(path):
        return write_text(path, card)


def complete_card(folder: str) -> None:
    """Completes the card that transformers has written into a folder before an upload.

    It adds PEFT's metadata (library and base), and the section of the adapter in that folder. Adapters in subfolders have
    their own cards.
    """
    path, config = Path(folder, "README.md"), Path(folder, "adapter_config.json")
    if not config.is_file():
        return
    with refusing(DataError, repr(str(config)), "Save the adapter again."):
        form = {"base_model_name_or_path": optional(text), "record": optional(mapping(plain))}
        saved = fields({}, form)(read_json(config), "the config")
    card = ModelCard.load(path)
    card.data.library_name = "peft"
    if saved.get("base_model_name_or_path"):
        card.data.base_model = saved["base_model_name_or_path"]
    card.save(path)
    if saved.get("record") is not None:
        write_card(folder, saved["record"])


def section(record: Mapping[str, Any]) -> str:
    """Returns the section as Markdown. Names and ids may come from anybody, so they are shown as text and never as markup.

    Raises:
        DataError: The record does not have the form that a saved adapter's record has.

    Example:
        >>> record = {"method": {"name": "pafi", "parameters": {}, "steps": 1}, "budget": 5, "used": 5, "step": 9,
        ...           "whole": 0, "parameters": 100, "base_id": "a/b", "fingerprint": "sha256:0", "dense": []}
        >>> section(record).splitlines()[4]
        '| base model | `a/b` |'
    """
    with refusing(DataError, "the adapter's record", "Save the adapter again."):
        _RECORD(record, "record")
    share, names = record["used"] / max(1, record["parameters"]), ", ".join(map(_code, record["dense"]))
    method = record["method"]
    settings = ", ".join(
        f"{name} {value}" for name, value in {**method["parameters"], "steps": method["steps"]}.items()
    )
    rows = {
        "base model": _code(record["base_id"] or "not known"),
        "base's fingerprint": _code(record["fingerprint"]),
        "method": _escaped(f"{method['name']} ({settings})"),
        "budget": f"{record['budget']:,} single weights",
        "selected": f"{record['used']:,} of {record['parameters']:,} weights ({share:.4%})",
        "stored whole, outside the budget": f"{record['whole']:,} numbers" + (f" ({names})" if names else ""),
        "optimizer steps": f"{record['step']:,}",
    }
    lines = [f"| {key} | {text} |" for key, text in rows.items()]
    return "\n".join(["## Selective fine-tuning", "", "| | |", "|---|---|", *lines, "", _USE])


_USE = """The adapter holds the trained values of single weights (arXiv 2408.14470), not differences. It fits the base with this
fingerprint bit for bit, and no other. To load it: `import unmask.peft`, then `peft.PeftModel.from_pretrained` as usual."""


def _code(words: str) -> str:
    """Formats words as code: as a code span, or as an HTML element if a character would end or break the span."""
    return f"`{words}`" if re.fullmatch(r"[A-Za-z0-9_./:@+ -]+", words) else f"<code>{_escaped(words)}</code>"


def _escaped(words: str) -> str:
    """Escapes all markup of Markdown and HTML in words, and puts them into one line.

    Example:
        >>> _escaped("a|b <i> random_mask")
        'a&#124;b &#60;i&#62; random_mask'
    """
    line = " ".join(words.split())
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])|[^\w .,:/()+%@-]", lambda found: f"&#{ord(found[0])};", line)


_RECORD = fields(
    {
        "method": fields({"name": text, "parameters": mapping(plain), "steps": count}),
        **dict.fromkeys(("budget", "used", "parameters", "whole", "step"), count),
        "base_id": optional(text),
        "fingerprint": text,
        "dense": items(text),
    }
)
