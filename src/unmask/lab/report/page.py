"""Writes the report: one HTML page that holds its style, script and figures, and escapes all text from runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from unmask import __version__
from unmask.errors import ConfigError, need
from unmask.files import write_text
from unmask.lab.report.context import study_context
from unmask.lab.report.reading import Study, read_study


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Writes the page of one or several studies.

    Args:
        folders: Folders of sweeps, or of runs of ``unmask train``.
        output: The HTML file; it is written in one step.

    Returns:
        The file's path.

    Raises:
        DataError: A folder holds neither, or a file in it is damaged.
        ConfigError: ``output`` is a folder.
    """
    output = Path(output)
    if output.is_dir():
        raise ConfigError(f"{str(output)!r} is a folder; give the name of an HTML file.")
    return write_text(output, page([read_study(folder) for folder in folders]))


def page(studies: Sequence[Study]) -> str:
    """Returns the page as text. It refers to nothing outside itself.

    Raises:
        MissingExtraError: Jinja is not installed (extra ``cli``).
    """
    jinja = need("jinja2", "cli")
    source, style, script = (
        files("unmask.lab.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html.j2", "page.css", "page.js")
    )
    environment = jinja.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja.StrictUndefined,
        keep_trailing_newline=True,
    )
    text: str = environment.from_string(source).render(
        title=studies[0].title or studies[0].name if len(studies) == 1 else f"{len(studies)} studies",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=style,
        script=script,
        studies=[study_context(study, f"s{number}") for number, study in enumerate(studies)],
    )
    return text.lstrip()
