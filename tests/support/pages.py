"""Reads the README and the pages of the docs: their code blocks, their inline code and their links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from helpers import ROOT

PAGES = {"README.md": ROOT / "README.md", **{path.name: path for path in sorted((ROOT / "docs").glob("*.md"))}}


def text_of(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Returns the fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), flags=re.MULTILINE | re.DOTALL)


def inline_code(name: str) -> list[str]:
    """Returns the inline code outside the fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def run_page(name: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs the Python blocks of a page in order, as one program.

    Args:
        name: The page's file name.
        names: The names that the page takes as given, such as ``model`` and ``loader``.

    Returns:
        All names of the program at its end.
    """
    program = blocks(name, "python")
    assert program, f"{name} has no Python block"
    known = {"__name__": "page", **(names or {})}
    exec(compile("\n".join(program), name, "exec"), known)
    return known


def commands(name: str) -> list[list[str]]:
    """Returns the shell commands of a page as lists of arguments; comments are left out."""
    lines = "\n".join(blocks(name, "sh")).replace("\\\n", " ").splitlines()
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [part for part in parts if part]


def links(name: str) -> list[tuple[Path, str]]:
    """Returns the links of a page into this checkout: the file, and the anchor (or an empty text)."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(name))
    inside = [target.partition("#") for target in targets if "://" not in target]
    return [((PAGES[name].parent / path).resolve() if path else PAGES[name], anchor) for path, _, anchor in inside]


def anchors(path: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
