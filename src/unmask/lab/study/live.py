"""What a sweep shows while it runs: a table of runs, and an estimate of the time left. No torch here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from unmask.lab.study.cells import Cell, runs
from unmask.lab.study.choosing import choose, due
from unmask.lab.study.pool import Worker
from unmask.lab.study.spec import Choice, Protocol
from unmask.lab.study.store import Result

SHOWN = 12  # ended runs in the live table


class LiveTable:
    """A live table in a terminal; elsewhere a line for each run that ends.

    Args:
        cells: The whole grid.
        protocol: The sweep's protocol.
        choice: How the sweep chooses a setting.
        console: Where to draw.
        workers: How many runs go on at a time.
    """

    def __init__(
        self, cells: Sequence[Cell], protocol: Protocol, choice: Choice | None, console: Console, workers: int
    ) -> None:
        self._cells, self._console, self._workers = list(cells), console, workers
        self._protocol, self._choice = protocol, choice
        self._ended: deque[tuple[Cell, Result]] = deque(maxlen=SHOWN)
        self._results: Mapping[str, Result] = {}
        self._running: list[Worker] = []
        self._live = (
            Live(console=console, get_renderable=self._draw, refresh_per_second=2) if console.is_terminal else None
        )

    def __enter__(self) -> LiveTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, results: Mapping[str, Result], workers: Iterable[Worker]) -> None:
        """Takes in where the sweep stands."""
        self._results, self._running = results, [w for w in workers if w.cell]

    def ended(self, cell: Cell, result: Result) -> None:
        """Takes in a run that has ended."""
        self._ended.append((cell, result))
        if self._live is None:
            self.say(f"{cell.id}  {describe(cell)}  {outcome(result)}  ({self._counts()})")

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _counts(self) -> str:
        left = remaining(self._cells, self._protocol, self._choice, self._results)
        failed = sum(result["status"] == "failed" for result in self._results.values())
        spent = {w.cell.id: w.elapsed for w in self._running if w.cell}
        estimate = time_left(left, self._results, spent, self._workers)
        words = [f"{len(self._results)} ended", f"{len(left)} to go"] + ([f"{failed} failed"] if failed else [])
        return ", ".join(words) + (f", about {duration(estimate)} left" if estimate else "")

    def _draw(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("run", "", "outcome", "time"):
            table.add_column(column, no_wrap=column == "run", justify="right" if column == "time" else "left")
        for cell, result in self._ended:
            words = (cell.id, describe(cell), outcome(result), duration(result.get("seconds", 0.0)))
            table.add_row(*map(Text, words))  # not as markup: a name or an error may hold [brackets]
        for worker in self._running:
            if worker.cell:
                words = (worker.cell.id, describe(worker.cell), "running", duration(worker.elapsed))
                table.add_row(*map(Text, words), style="bold")
        return Group(table, Text(self._counts()))


def describe(cell: Cell) -> str:
    """A cell's labels in one line.

    Example:
        >>> describe(Cell("x", {"method": "id3", "seed": 0, "budget": None}, {}))
        'id3, seed 0'
    """
    labels = dict(cell.labels)
    return ", ".join([str(labels.pop("method", ""))] + [f"{k} {v}" for k, v in labels.items() if v is not None])


def outcome(result: Result) -> str:
    """A result in a few words."""
    if result["status"] == "failed":
        return f"failed: {(result.get('error') or {}).get('message', '')}"[:100]
    score, loss = result.get("score"), result.get("loss")
    words = [f"{result.get('metric', 'score')} {score:.4f}"] if isinstance(score, float) else []
    return ", ".join(words + ([f"loss {loss:.4f}"] if isinstance(loss, float) else [])) or "done"


def remaining(
    cells: Sequence[Cell], protocol: Protocol, choice: Choice | None, results: Mapping[str, Result]
) -> list[Cell]:
    """Runs still to do, with one value of the chosen setting where the choice is not made yet."""
    known = {cell.id for cell in due(cells, protocol, choice, results)}
    left = [cell for cell in runs(cells) if cell.id in known and cell.id not in results]
    if choice is None or (protocol.kind == "paper" and protocol.pair):
        return left
    open_groups = {key for key, chosen in choose(cells, choice, results).items() if not chosen.final}
    later: dict[Any, Cell] = {}
    for cell in cells:
        if cell.group(choice.setting, "seed") in open_groups and cell.id not in known:
            later.setdefault(cell.group(choice.setting), cell)
    return left + list(later.values())


def time_left(
    left: Sequence[Cell], results: Mapping[str, Result], spent: Mapping[str, float], workers: int
) -> float | None:
    """Seconds that the remaining runs will take; None while nothing has ended.

    A run is taken to last as long as the mean of those that are most like it: same task, method and steps, else same task
    and steps, else any.

    Args:
        left: Runs that have not ended, those under way included.
        results: Of the others.
        spent: Seconds of those under way, by id.
        workers: How many go on at a time.

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
    """Seconds for people.

    Example:
        >>> duration(75), duration(3 * 3600 + 120)
        ('1:15', '3:02:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
