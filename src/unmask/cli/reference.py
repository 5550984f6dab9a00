"""Writes the table of settings in docs/cli.md from their class: ``python -m unmask.cli.reference --write docs/cli.md``.

``--check docs/cli.md`` writes nothing, and ends with status 1 if the table in the file is not up to date.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from unmask.cli.options import plain
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.fields import settings_of

_START, _END = "<!-- table: settings of unmask train -->\n", "<!-- end -->"


def filled(page: str) -> str:
    """Returns a page with its table made again: each setting's name, default and help text, between two comments."""
    place = re.compile(f"({_START}).*?({_END})", re.DOTALL)
    if not place.search(page):
        raise ValueError(f"the page has no line {_START.strip()!r} with a line {_END!r} after it")
    rows = ["| setting | default | |", "|---|---|---|"]
    for each in settings_of(TrainConfig).values():
        default = "(must be given)" if each.default is dataclasses.MISSING else plain(each.default)
        words = f" One of {', '.join(f'`{word}`' for word in each.words)}." if not each.types else ""
        text = (each.help + words).replace("|", r"\|")
        rows.append(f"| `{each.name}` | {default} | {text} |")
    table = "".join(f"{row}\n" for row in rows)
    return place.sub(lambda found: f"{found[1]}{table}{found[2]}", page)


def main(arguments: list[str]) -> int:
    """Writes or checks a page; returns the exit status."""
    if len(arguments) != 2 or arguments[0] not in ("--write", "--check"):
        print("give --write FILE or --check FILE", file=sys.stderr)
        return 2
    path = Path(arguments[1])
    page = path.read_text(encoding="utf-8")
    made = filled(page)
    if made == page:
        return 0
    if arguments[0] == "--check":
        print(f"{path} is not up to date; run: python -m unmask.cli.reference --write {path}", file=sys.stderr)
        return 1
    path.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
