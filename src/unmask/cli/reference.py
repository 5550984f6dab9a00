"""Writes the tables of docs/cli.md from the settings classes: ``python -m unmask.cli.reference --write docs/cli.md``.

``--check docs/cli.md`` writes nothing, and ends with status 1 if the tables in the file are not up to date.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from unmask.cli.options import plain
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.fields import settings_of

_TABLES = {"settings of unmask train": TrainConfig}


def table(settings: type) -> str:
    """Returns a Markdown table of a settings class: each setting's name, default and help text."""
    rows = ["| setting | default | |", "|---|---|---|"]
    for each in settings_of(settings).values():
        default = "(must be given)" if each.default is dataclasses.MISSING else plain(each.default)
        words = f" One of {', '.join(f'`{word}`' for word in each.words)}." if not each.types else ""
        text = (each.help + words).replace("|", r"\|")
        rows.append(f"| `{each.name}` | {default} | {text} |")
    return "\n".join(rows)


def filled(page: str) -> str:
    """Returns a page with its tables made again. A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, settings in _TABLES.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"the page has no line '<!-- table: {name} -->' with a line '<!-- end -->' after it")
        made = table(settings)
        page = place.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", page)  # type: ignore[misc]
    return page


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
