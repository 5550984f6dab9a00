"""The display of a running sweep: a table of its runs, and an estimate of the time left. It imports no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from unmask.lab.study.cells import Cell, distinct
from unmask.lab.study.choosing import choose, due
from unmask.lab.study.spec import Choice, Protocol, Sweep
from unmask.lab.study.store import Result, Results

SHOWN = 12
"""The live table shows so many ended runs."""


class LiveTable:
    """Shows a running sweep: a live table in a terminal, and elsewhere a line for each run that ends.

    Attributes:
        display: The context in which the table is shown.
    """

    def __init__(self, sweep: Sweep, cells: Sequence[Cell], console: Console, workers: int) -> None:
        self._sweep, self._cells, self._console, self._workers = sweep, cells, console, workers
        self._ended: deque[tuple[Cell, Result]] = deque(maxlen=SHOWN)
        self._results: Results = {}
        self._under_way: list[tuple[Cell, float]] = []
        live = Live(console=console, get_renderable=self._draw, refresh_per_second=2)
        self.display: AbstractContextManager[object] = live if console.is_terminal else nullcontext()

    def update(self, results: Results, under_way: Iterable[tuple[Cell, float]]) -> None:
        """Records the results of the ended runs, and the runs under way with the monotonic time of their start."""
        self._results, self._under_way = results, list(under_way)

    def ended(self, cell: Cell, result: Result) -> None:
        """Records a run that has ended."""
        self._ended.append((cell, result))
        if not self._console.is_terminal:
            self.say(f"{cell.id}  {describe(cell)}  {outcome(result)}  ({self._counts()})")

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _counts(self) -> str:
        left = remaining(self._cells, self._sweep.protocol, self._sweep.choice, self._results)
        failed = sum(result["status"] == "failed" for result in self._results.values())
        now = time.monotonic()
        spent = {cell.id: now - since for cell, since in self._under_way}
        estimate = time_left(left, self._results, spent, self._workers)
        words = [f"{len(self._results)} ended", f"{len(left)} to go"] + ([f"{failed} failed"] if failed else [])
        return ", ".join(words) + (f", about {duration(estimate)} left" if estimate else "")

    def _draw(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("run", "", "outcome", "time"):
            table.add_column(column, no_wrap=column == "run", justify="right" if column == "time" else "left")
        for cell, result in self._ended:  # Text, and not markup: a name or an error may hold [brackets].
            words = (cell.id, describe(cell), outcome(result), duration(result.get("seconds", 0.0)))
            table.add_row(*map(Text, words))
        now = time.monotonic()
        for cell, since in self._under_way:
            table.add_row(*map(Text, (cell.id, describe(cell), "running", duration(now - since))), style="bold")
        return Group(table, Text(self._counts()))


def describe(cell: Cell) -> str:
    """Returns a cell's labels in one line.

    Example:
        >>> describe(Cell("x", {"method": "id3", "seed": 0, "budget": None}, {}))
        'id3, seed 0'
    """
    labels = dict(cell.labels)
    return ", ".join([str(labels.pop("method", ""))] + [f"{k} {v}" for k, v in labels.items() if v is not None])


def outcome(result: Result) -> str:
    """Returns a result in a few words."""
    if result["status"] == "failed":
        return f"failed: {(result.get('error') or {}).get('message', '')}"[:100]
    score, loss = result.get("score"), result.get("loss")
    words = [f"{result.get('metric', 'score')} {score:.4f}"] if isinstance(score, float) else []
    return ", ".join(words + ([f"loss {loss:.4f}"] if isinstance(loss, float) else [])) or "done"


def remaining(cells: Sequence[Cell], protocol: Protocol, choice: Choice | None, results: Results) -> list[Cell]:
    """Returns a cell for each run that is still to be made; where a choice is open, one value of the setting counts."""
    known = {cell.id for cell in due(cells, protocol, choice, results)}
    left = [cell for cell in distinct(cells) if cell.id in known and cell.id not in results]
    if choice is None or (protocol.kind == "paper" and protocol.pair):
        return left
    open_groups = {key for key, chosen in choose(cells, choice, results).items() if not chosen.final}
    later: dict[Any, Cell] = {}
    for cell in cells:
        if cell.group(choice.setting, "seed") in open_groups and cell.id not in known:
            later.setdefault(cell.group(choice.setting), cell)
    return left + list(later.values())


def time_left(left: Sequence[Cell], results: Results, spent: Mapping[str, float], workers: int) -> float | None:
    """Estimates how many seconds the remaining runs take; None while nothing has ended.

    The estimate of a run is the mean of the ended runs that are most like it: those of the same task, method and
    steps, else those of the same task and steps, else all. The runs under way are among ``left``, and ``spent`` holds
    the seconds that they have taken so far.

    Example:
        >>> cells = [Cell(str(i), {}, {"task": "rte"}) for i in range(4)]
        >>> time_left(cells, {"a": {"status": "done", "seconds": 10.0, "settings": {"task": "rte"}}}, {"0": 4.0}, 2)
        18.0
    """
    known: dict[Any, list[float]] = {}
    for result in results.values():
        if result["status"] == "done":
            for key in _alike(result["settings"]):
                known.setdefault(key, []).append(float(result.get("seconds", 0.0)))
    if not known or not left:
        return None
    each = [fmean(next(known[key] for key in _alike(cell.settings) if key in known)) for cell in left]
    rest = [max(0.0, seconds - spent.get(cell.id, 0.0)) for cell, seconds in zip(left, each, strict=True)]
    return max(sum(rest) / workers, max(rest))


def _alike(settings: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    where = tuple(settings.get(key) for key in ("model", "task", "max_steps", "epochs", "batch_size"))
    return [(*where, settings.get("method"), settings.get("into")), where, ()]


def duration(seconds: float) -> str:
    """Returns a time in seconds as hours, minutes and seconds.

    Example:
        >>> duration(75), duration(3 * 3600 + 120)
        ('1:15', '3:02:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
