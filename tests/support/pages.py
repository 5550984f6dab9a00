"""Runs the code of a page of the docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name: str) -> dict[str, Any]:
    """Runs the fenced Python blocks of one page in order, as one program; returns its names."""
    names: dict[str, Any] = {"__name__": "page"}
    text = (DOCS / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks, f"{name} has no Python block"
    exec(compile("\n".join(blocks), name, "exec"), names)
    return names
