"""Writes the results of the benchmark commands into the page that reports them.

    python benchmarks/page.py OUT docs/benchmarks.md

OUT is the folder that was given to the scripts beside this file. Under "## Results" the sections of the runs in OUT are replaced;
the others, and what stands after "## Reading them", stay.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from unmask.lab.bench import tables

TITLES = {
    "reference": "RoBERTa-base shape, 16 x 128, float32: the bars against the floor, LoRA and SHiRA",
    "reference-draws": "The same with new processes for every round",
    "reference-full": "The bars against full fine-tuning and the authors' toolkit",
    "reference-others": "B = 1e6 against B = 1e4, and other rows",
    "reference-rest": "Fused AdamW and Super-Tuning",
    "reference-autocast": "The bar under bfloat16 autocast",
    "reference-autocast-draws": "The bar under autocast with new processes for every round",
    "reference-kept": "The bars against LoRA with a heap that keeps what was freed",
    "reference-autocast-kept": "The bar under autocast with such a heap",
    "reference-memory": "Peak memory",
    "reference-held": "Peak memory of what is held",
    "minilm": "MiniLM shape",
    "mpnet": "MPNet shape",
    "smollm2": "SmolLM2-135M shape",
    "llama-1b": "Llama-1B shape, bfloat16",
    "llama-7b": "Llama-7B shape, bfloat16, on a GPU",
    "curves/curve-budget": "A step's cost over the budget",
    "curves/curve-size": "A step's cost over the size of the model",
    "curves/curve-selection": "The cost of selecting",
}


def section(name: str, record: dict[str, Any], out: Path) -> str:
    """One run: its command, where it ran, its tables."""
    record["verdicts"] = record.get("verdicts") or {"apply": True, "bars": []}
    record["verdicts"]["bars"] = [bar for bar in record["verdicts"]["bars"] if bar["measured"] is not None]
    if not name.startswith("reference"):
        record["verdicts"] = {"apply": True, "bars": []}  # they are not defined for it
    record["command"] = re.sub(re.escape(str(out)), "OUT", record["command"])
    return f"### {TITLES[name]}\n\n{tables.markdown(record)}"


def profiles(file: Path, out: Path) -> str:
    """Where a step's time goes, as `operators.py` found it."""
    record = json.loads(file.read_text())
    command = re.sub(re.escape(str(out)), "OUT", record["command"])
    return f"### Where a step's time goes, {record['settings']['dtype']}\n\n    {command}\n\n{record['table']}\n"


def kept(results: str) -> dict[str, str]:
    """The page's present sections by title."""
    parts = re.split(r"^### (.+)$", results, flags=re.MULTILINE)[1:]
    return {title: f"### {title}{text.rstrip()}\n" for title, text in zip(parts[::2], parts[1::2], strict=True)}


def main() -> None:
    """The command."""
    out, page = Path(sys.argv[1]), Path(sys.argv[2])
    head, _, rest = page.read_text().partition("## Results\n")
    results, found, reading = rest.partition("## Reading them\n")
    sections = kept(results)
    for name, title in TITLES.items():
        file = out / f"{name}.json" if name.startswith("curves/") else out / name / "bench.json"
        if file.is_file():
            sections[title] = section(name, json.loads(file.read_text()), out)
    for file in out.glob("operators*.json"):
        text = profiles(file, out)
        sections[text.partition("\n")[0].removeprefix("### ")] = text
    order = {title: place for place, title in enumerate(TITLES.values())}
    lines = [sections[title] for title in sorted(sections, key=lambda title: order.get(title, len(order)))]
    page.write_text(f"{head}## Results\n\n" + "\n".join(lines) + (f"\n{found}{reading}" if found else ""))


if __name__ == "__main__":
    main()
