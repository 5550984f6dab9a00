"""The look of figures: colours for a light page, a dark page and adaptive SVG, one colour for a family of methods.

Every series colour has a contrast of 3 or more against both pages. Any two colours also differ for readers without red
or green cones (a test simulates them), and marker shapes differ with the colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unmask.errors import need

Figure = Any
"""A ``matplotlib.figure.Figure``. Its class is imported only where a figure is drawn."""


@dataclass(frozen=True)
class Style:
    """The colours of everything that is not data.

    Attributes:
        ink: The colour of text and axes.
        muted: The colour of secondary text.
        grid: The colour of the thin lines behind the data.
        paper: The colour of the page; ``"none"`` for a transparent one.
        fill: The strongest colour of the heat maps; smaller values are more transparent.
        on_fill: The colour of text on a strong fill.
    """

    ink: str
    muted: str
    grid: str
    paper: str
    fill: str
    on_fill: str


INK = "#000001"
"""The ink that becomes ``currentColor`` in SVG."""
LIGHT = Style(ink="#1a1c1f", muted="#5c6168", grid="#dcdee1", paper="#ffffff", fill="#1f5fa8", on_fill="#ffffff")
DARK = Style(ink="#eceef0", muted="#a3a9b1", grid="#383c42", paper="#16181c", fill="#5ba3ee", on_fill="#0b0e12")
ADAPTIVE = Style(ink=INK, muted="#7d838b", grid="#7d838b50", paper="none", fill="#2f74c0", on_fill="#ffffff")

SERIES = ("#d55e00", "#4a62b4", "#2ba770", "#7f53e1", "#905b18", "#db5755", "#1e99cb", "#985066", "#909499")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*")
LINES = ("-", (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (2, 2)))
_FAMILIES = {
    "id3": 1, "increment": 1, "lora": 0, "dora": 0, "pafi": 2, "sparse": 2, "fish": 3, "snip": 3, "bitfit": 4, "shira": 6,
    "repeat": 5, "static": 7, "random": 8,
}  # fmt: skip
RED = SERIES[5]
"""The colour of repeat-S, as in the paper's Figure 5."""


@dataclass(frozen=True)
class Look:
    """The colour, marker and line style of one method, as matplotlib takes them."""

    colour: str
    marker: str
    line: Any


def look_of(methods: list[str]) -> dict[str, Look]:
    """Returns a look for each method.

    Known families have the same colour in every figure. Within a family, markers and dashes differ.

    Example:
        >>> looks = look_of(["id3", "id3 exp=0", "lora"])
        >>> looks["id3"].colour == looks["id3 exp=0"].colour, looks["id3"].marker == looks["id3 exp=0"].marker
        (True, False)
    """
    looks: dict[str, Look] = {}
    seen: dict[int, int] = {}
    for i, method in enumerate(methods):
        family = next((at for start, at in _FAMILIES.items() if method.lower().startswith(start)), i % len(SERIES))
        before = seen.get(family, 0)
        seen[family] = before + 1
        looks[method] = Look(SERIES[family], MARKERS[(family + 4 * before) % len(MARKERS)], LINES[before % len(LINES)])
    return looks


def new_figure(width: float, height: float, style: Style) -> Figure:
    """Returns an empty figure; width and height are in inches."""
    return need("matplotlib.figure", "plot").Figure(
        figsize=(width, height), dpi=150, layout="constrained", facecolor=style.paper
    )


def dress(axes: Any, style: Style, grid: str = "both") -> None:
    """Gives axes two thin spines instead of a box, and light lines behind the data."""
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set(color=style.muted, linewidth=0.8)
    axes.tick_params(which="both", colors=style.muted, labelcolor=style.ink, labelsize=8, width=0.8, length=3)
    axes.tick_params(which="minor", length=0)
    if grid:
        axes.grid(True, axis=grid, which="major", color=style.grid, linewidth=0.7)
        axes.set_axisbelow(True)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=style.ink, fontsize=9)
