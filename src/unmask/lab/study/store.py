"""The folder of a sweep: one JSON file for each run, written in one step, so that a kill leaves no half file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError, DataError
from unmask.files import write_json
from unmask.lab.study.curves import SNAPSHOT, consistent
from unmask.lab.training import locking
from unmask.reading import (
    Form,
    count,
    fields,
    finite,
    items,
    mapping,
    number,
    one_of,
    optional,
    plain,
    read_json,
    refusing,
    scalar,
    text,
)

Result = dict[str, Any]
STATES = ("done", "failed")
_AGAIN = "To make that run again, remove the file."


def _setting(value: Any, where: str) -> Any:
    """Checks a setting's value: a text, a number, true, false, null, or a list of these."""
    return items(scalar)(value, where) if isinstance(value, list | tuple) else scalar(value, where)


def _rate(value: Any, where: str) -> Any:
    return value if value == "auto" else finite(value, where)


_LABELS = mapping(_setting)
_KNOWN = fields({}, {"seed": count, "lr": _rate, "eps": finite, "exp": finite, "test_sets": items(text)})


def _settings(value: Any, where: str) -> dict[str, Any]:
    return dict(_KNOWN(_LABELS(value, where), where))


_POINT = fields({"step": count, "used": count, "score": finite}, {"loss": finite})
_RESULT: Form = fields(
    {"status": one_of(*STATES), "labels": _LABELS, "settings": _settings},
    {
        "id": text,
        **dict.fromkeys(("score", "loss"), optional(number)),
        "seconds": optional(finite),
        **dict.fromkeys(("metric", "started", "host"), text),
        "resumed_at": optional(count),
        "summary": optional(consistent),
        "curve": optional(items(_POINT)),
        "allocation": optional(items(SNAPSHOT)),
        "series": items(fields({"step": count, "used": count, "score": optional(number), "file": text})),
        "versions": optional(mapping(scalar)),
        "error": optional(mapping(plain)),
    },
)
_PLAN: Form = fields(
    {
        **dict.fromkeys(("name", "title", "command"), text),
        **dict.fromkeys(("notes", "figures"), items(text)),
        "claims": optional(mapping(plain)),
        "choose": optional(mapping(plain)),
        "protocol": mapping(plain),
        "cells": items(fields({"id": text, "labels": _LABELS, "settings": _settings})),
    }
)


class Store:
    """A sweep's folder.

    ``results/ID.json`` is a run's result, ``runs/ID`` its output folder, ``logs/ID.log`` its printed output. The
    process that makes the run holds the lock ``locks/ID.lock``. ``sweep.json`` lists the runs of the sweep. The folder
    need not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def result_path(self, run: str) -> Path:
        """Returns the path of a run's result."""
        return self.folder / "results" / f"{run}.json"

    def output_path(self, run: str) -> Path:
        """Returns the output folder of a run."""
        return self.folder / "runs" / run

    def log_path(self, run: str) -> Path:
        """Returns the path of the file to which a run's output is printed."""
        return self.folder / "logs" / f"{run}.log"

    def result(self, run: str) -> Result | None:
        """Returns a run's result; None for a run that has not ended.

        Raises:
            DataError: The result cannot be read, or it is damaged.
        """
        path = self.result_path(run)
        return _read(path, _RESULT, "the result") if path.is_file() else None

    def results(self) -> dict[str, Result]:
        """Returns all results, by id.

        Raises:
            DataError: A result cannot be read, or it is damaged.
        """
        found = sorted(self.folder.glob("results/*.json"))
        return {path.stem: _read(path, _RESULT, "the result") for path in found}

    def write_result(self, run: str, result: Mapping[str, Any]) -> Path:
        """Writes a run's result in one step."""
        if result.get("status") not in STATES:
            raise ConfigError(f"status = {result.get('status')!r}; a result is {' or '.join(STATES)}.")
        return write_json(self.result_path(run), {"id": run, **result})

    def write_plan(self, plan: Mapping[str, Any]) -> Path:
        """Writes the sweep, its cells and the command."""
        return write_json(self.folder / "sweep.json", plan)

    def plan(self) -> dict[str, Any]:
        """Reads what `write_plan` wrote.

        Raises:
            DataError: The folder holds no sweep, or a damaged one.
        """
        path = self.folder / "sweep.json"
        if not path.is_file():
            raise DataError(
                f"{str(self.folder)!r} holds no sweep (no sweep.json); give a folder that `unmask sweep` wrote."
            )
        return _read(path, _PLAN, "the sweep", "Another version of unmask wrote it: run the sweep again.")

    @staticmethod
    def need_locks() -> None:
        """Checks that this system has the locks that a sweep needs.

        Raises:
            ConfigError: The system has no POSIX file locks.
        """
        if not locking.POSSIBLE:
            raise ConfigError("a sweep needs POSIX file locks, and this system has none; run it on Linux or macOS.")

    @contextlib.contextmanager
    def lock(self, run: str) -> Iterator[bool]:
        """Yields True if this process holds the run's lock in the block. The system frees the lock when the process ends."""
        self.need_locks()
        path = self.folder / "locks" / f"{run}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with locking.holding(path) as locked:
            # A process that was killed while it wrote the result has left such a part.
            for part in self.folder.glob(f"results/.{run}.json*.part") if locked else ():
                part.unlink(missing_ok=True)
            yield locked


def _read(path: Path, form: Form, what: str, advice: str = _AGAIN) -> dict[str, Any]:
    with refusing(DataError, repr(str(path)), advice):
        return dict(form(read_json(path), what))
