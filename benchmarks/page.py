"""Writes the results of the benchmark commands as pages of tables, one page for each group of runs.

    python benchmarks/page.py OUT benchmarks/results

OUT is the folder that was given to the scripts next to this file. On each page the sections of the runs in OUT are replaced,
and the other sections stay.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import bars

from unmask.lab.bench import tables

# The pages with their titles, and the runs on each of them with the titles of their sections.
PAGES: dict[str, tuple[str, dict[str, str]]] = {
    "reference": (
        "The RoBERTa-base shape: step times",
        {
            "reference": "RoBERTa-base shape, 16 x 128, float32: the bars against the floor, LoRA and SHiRA",
            "reference-full": "The bars against full fine-tuning and the authors' toolkit",
            "reference-others": "B = 1e6 against B = 1e4, and other rows",
            "reference-rest": "Fused AdamW and Super-Tuning",
            "reference-autocast": "The bar under bfloat16 autocast",
        },
    ),
    "memory": (
        "The RoBERTa-base shape: peak memory and bytes on disk",
        {"reference-memory": "Peak memory", "reference-held": "Peak memory of what is held"},
    ),
    "models": (
        "Other shapes",
        {
            "minilm": "MiniLM shape",
            "mpnet": "MPNet shape",
            "smollm2": "SmolLM2-135M shape",
            "llama-1b": "Llama-1B shape, bfloat16",
            "llama-7b": "Llama-7B shape, bfloat16, on a GPU",
        },
    ),
    "curves": (
        "Scaling curves",
        {
            "curves/curve-budget": "A step's cost over the budget",
            "curves/curve-size": "A step's cost over the size of the model",
            "curves/curve-selection": "The cost of selecting",
        },
    ),
    "operators": (
        "Where a step's time goes",
        {
            "operators": "Where a step's time goes, float32",
            "operators-autocast": "Where a step's time goes, autocast",
            "operators-bf16": "Where a step's time goes, bf16",
        },
    ),
}


def section(name: str, record: dict[str, Any], out: Path) -> str:
    """Returns one run's command, its machine and its tables; with the bars, if they apply to it."""
    record["command"] = re.sub(re.escape(str(out)), "OUT", record["command"])
    if name.startswith("operators"):
        return f"    {record['command']}\n\n{record['table']}\n"
    text = tables.markdown(record)
    judged = [] if "points" in record or bars.off_reference(record) else bars.table(bars.judge(record))
    return text + (f"\n{tables.markdown_table(bars.HEADER, judged)}\n" if judged else "")


def sections_of(page: str) -> dict[str, str]:
    """Returns the sections of a page by their titles."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)[1:]
    return {title: text.strip("\n") + "\n" for title, text in zip(parts[::2], parts[1::2], strict=True)}


def main() -> None:
    """Rewrites the pages for which there are results."""
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/page.py OUT benchmarks/results")
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for page_name, (heading, runs) in PAGES.items():
        page = folder / f"{page_name}.md"
        sections = sections_of(page.read_text()) if page.is_file() else {}
        for name, title in runs.items():
            file = out / f"{name}.json" if name.startswith(("curves/", "operators")) else out / name / "bench.json"
            if file.is_file():
                sections[title] = section(name, json.loads(file.read_text()), out)
        order = {title: place for place, title in enumerate(runs.values())}
        titles = sorted(sections, key=lambda title: order.get(title, len(order)))
        if titles:
            page.write_text("\n".join([f"# {heading}\n", *(f"## {title}\n\n{sections[title]}" for title in titles)]))


if __name__ == "__main__":
    main()
