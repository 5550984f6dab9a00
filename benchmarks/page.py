"""Writes the results of the benchmark commands into the page that reports them.

    python benchmarks/page.py OUT docs/benchmarks.md

OUT is the folder that was given to the scripts beside this file. Everything after the line "## Results" is replaced, but for
what stands after "## Reading them".
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from unmask.bench import tables

TITLES = {
    "reference": "RoBERTa-base shape, 16 x 128, float32: the bars against the floor, LoRA and SHiRA",
    "reference-full": "The bars against full fine-tuning and the authors' toolkit",
    "reference-others": "B = 1e6 against B = 1e4, and other rows",
    "reference-rest": "Fused AdamW and Super-Tuning",
    "reference-autocast": "The bar under bfloat16 autocast",
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


def main() -> None:
    """The command."""
    out, page = Path(sys.argv[1]), Path(sys.argv[2])
    sections = []
    for name in TITLES:
        file = out / f"{name}.json" if name.startswith("curves/") else out / name / "bench.json"
        if file.is_file():
            sections.append(section(name, json.loads(file.read_text()), out))
    sections += [profiles(file, out) for file in sorted(out.glob("operators*.json"), key=lambda file: len(file.name))]
    head, _, rest = page.read_text().partition("## Results\n")
    _, found, reading = rest.partition("## Reading them\n")
    page.write_text(head + "## Results\n\n" + "\n".join(sections) + ("\n" + found + reading if found else ""))


if __name__ == "__main__":
    main()
