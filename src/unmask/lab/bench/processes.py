"""A row's process: how it is started, what it says, and how it ended."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from unmask.lab.bench.rows import Row
from unmask.lab.bench.settings import BenchSettings


def command(module: str, settings: BenchSettings, row: Row) -> list[str]:
    """``python -m MODULE SETTINGS LABEL``, which `told` reads."""
    return [sys.executable, "-m", module, json.dumps(settings.as_json()), row.label]


def environment(settings: BenchSettings) -> dict[str, str]:
    """As many threads as the run's, and no network."""
    return {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}


def told(words: Sequence[str]) -> tuple[BenchSettings, Row]:
    """The settings and the row of a process, from ``sys.argv``."""
    settings = BenchSettings(**json.loads(words[1]))
    return settings, next(row for row in settings.rows() if row.label == words[2])


def say(mark: str, words: dict[str, Any]) -> None:
    """A line of JSON behind a mark: libraries print lines of their own."""
    print(mark + json.dumps(words), flush=True)


def heard(mark: str, line: str) -> dict[str, Any] | None:
    """What a line says; None if it is a library's."""
    return json.loads(line.removeprefix(mark)) if line.startswith(mark) else None


def ending(code: int, otherwise: str | None = None) -> str:
    """How a process ended: its signal, else ``otherwise``, else its status.

    Example:
        >>> ending(-9), ending(1), ending(1, "ValueError: no")
        ('the process was killed by signal 9 (out of memory?)', 'exit status 1', 'ValueError: no')
    """
    if code < 0:
        return f"the process was killed by signal {-code} (out of memory?)"
    return otherwise or f"exit status {code}"


def short(error: BaseException) -> str:
    """An error in a line of at most 300 characters and its kind.

    Example:
        >>> short(ValueError("no such thing\\nat all"))
        'ValueError: no such thing'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
