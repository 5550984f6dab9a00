"""Writes figures: PNG for a light and a dark page, and one SVG that takes the page's own colour of text."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from unmask.errors import DataError, need
from unmask.lab.figures.style import ADAPTIVE, DARK, INK, LIGHT, Figure, Style

Draw = Callable[[Style], Figure]
"""A function that draws a figure in a style, such as ``lambda style: score_against_share(records, style)``."""


def figure_files(path: Path) -> list[Path]:
    """Returns a figure's files: ``NAME.png``, ``NAME-dark.png`` and ``NAME.svg``, or the one file that the path names.

    Raises:
        DataError: The path has another ending, or no name.

    Example:
        >>> [str(file) for file in figure_files(Path("out/fig"))]
        ['out/fig.png', 'out/fig-dark.png', 'out/fig.svg']
    """
    if not path.name or path.suffix not in ("", ".png", ".svg"):
        raise DataError(f"{str(path)!r} must end in .png or .svg, or have no ending for both.")
    if path.suffix:
        return [path]
    return [path.with_name(f"{path.name}{ending}") for ending in (".png", "-dark.png", ".svg")]


def write_figure(draw: Draw, path: Path) -> list[Path]:
    """Writes a figure as the files of `figure_files`.

    Args:
        draw: The function that draws the figure in a style.
        path: The path without an ending for all three files, or with ``.png`` or ``.svg`` for one.

    Returns:
        The paths of the written files.

    Raises:
        DataError: The path has another ending.
        MissingExtraError: matplotlib is not installed.
    """
    written = figure_files(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for file in written:
        if file.suffix == ".svg":
            file.write_text(svg(draw), encoding="utf-8")
        else:
            draw(DARK if file.stem.endswith("-dark") and not path.suffix else LIGHT).savefig(file)
    return written


def svg(draw: Draw, salt: str = "figure") -> str:
    """Returns a figure as SVG text for an HTML page: transparent, its text and axes in the page's ``currentColor``.

    The text is the ``<svg>`` element without an XML header. The same figure has the same text. Its ids are made from
    ``salt``, so each figure of a page needs another one.
    """
    rc = need("matplotlib", "plot").rc_context
    text = io.StringIO()
    with rc({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        draw(ADAPTIVE).savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    element = text.getvalue()
    return element[element.index("<svg") :].replace(INK, "currentColor")
