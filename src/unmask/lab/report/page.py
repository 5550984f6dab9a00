"""The report's page: everything in one file, text from runs escaped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from unmask.errors import ConfigError
from unmask.files import write_text
from unmask.lab.report.reading import Study, read_study
from unmask.lab.report.sections import study_section
from unmask.version import __version__

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Writes the page of one or several studies.

    Args:
        folders: Of sweeps, or of runs of ``unmask train``.
        output: The HTML file; written in one step.

    Raises:
        DataError: A folder holds neither, or a damaged file.
        ConfigError: ``output`` is a folder.
    """
    output = Path(output)
    if output.is_dir():
        raise ConfigError(f"{str(output)!r} is a folder; give the name of an HTML file.")
    return write_text(output, page([read_study(folder) for folder in folders]))


def page(studies: Sequence[Study]) -> str:
    """The page as text: no reference to anything outside it."""
    title = studies[0].title or studies[0].name if len(studies) == 1 else f"{len(studies)} studies"
    style, script = (
        files("unmask.lab.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    contents = "".join(study_section(study, f"s{number}", len(studies) > 1) for number, study in enumerate(studies))
    links = "".join(f'<a href="#s{n}">{escape(s.title or s.name)}</a>' for n, s in enumerate(studies))
    menu = f"<nav>{links}</nav>" if len(studies) > 1 else ""
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p class="muted">Written {written} by unmask {escape(__version__)}</p>{menu}</header>
<main>
{contents}</main>
<script>
{script}</script>
</body>
</html>
"""
