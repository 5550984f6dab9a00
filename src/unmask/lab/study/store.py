"""Where a sweep keeps its results: one JSON per run, written in one step, so that a kill leaves none in pieces. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError, DataError
from unmask.files import write_json
from unmask.lab.study.curves import CONSISTENT, SNAPSHOT
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
_AGAIN = "To run that run again, remove it."


def setting(value: Any, where: str) -> Any:
    """The form of a setting's value: a text, a number, true, false, null, or a list of these."""
    return items(scalar)(value, where) if isinstance(value, list | tuple) else scalar(value, where)


def _rate(value: Any, where: str) -> Any:
    return value if value == "auto" else finite(value, where)


LABELS = mapping(setting)
_KNOWN = {"seed": count, "lr": _rate, "eps": finite, "exp": finite, "test_sets": items(text)}
_SETTINGS = fields({}, _KNOWN)


def settings(value: Any, where: str) -> dict[str, Any]:
    """The form of a run's settings."""
    return dict(_SETTINGS(mapping(setting)(value, where), where))


_POINT = fields({"step": count, "used": count, "score": finite}, {"loss": finite})
_RESULT: Form = fields(
    {"status": one_of(*STATES), "labels": LABELS, "settings": settings},
    {
        "id": text,
        **dict.fromkeys(("score", "loss"), optional(number)),
        "seconds": optional(finite),
        **dict.fromkeys(("metric", "started", "host"), text),
        "resumed_at": optional(count),
        "summary": optional(CONSISTENT),
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
        "cells": items(fields({"id": text, "labels": LABELS, "settings": settings})),
    }
)


class Store:
    """A sweep's folder.

    ``results/ID.json`` is a run's result, ``runs/ID`` its output, ``logs/ID.log`` what it printed, ``locks/ID.lock`` is locked
    by the process that runs it, ``sweep.json`` tells what is to be run.

    Args:
        folder: May be new.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def result_path(self, run: str) -> Path:
        return self.folder / "results" / f"{run}.json"

    def output_path(self, run: str) -> Path:
        return self.folder / "runs" / run

    def log_path(self, run: str) -> Path:
        return self.folder / "logs" / f"{run}.log"

    def result(self, run: str) -> Result | None:
        """A run's result; None for a run that has not ended.

        Raises:
            DataError: It cannot be read, or it is damaged.
        """
        path = self.result_path(run)
        return _read(path, _RESULT, "the result") if path.is_file() else None

    def results(self) -> dict[str, Result]:
        """All results, by id.

        Raises:
            DataError: One cannot be read, or it is damaged.
        """
        found = sorted(self.folder.glob("results/*.json"))
        return {path.stem: _read(path, _RESULT, "the result") for path in found}

    def write_result(self, run: str, result: Mapping[str, Any]) -> Path:
        """Writes a run's result in one step."""
        if result.get("status") not in STATES:
            raise ConfigError(f"status = {result.get('status')!r}; a result is {' or '.join(STATES)}.")
        return write_json(self.result_path(run), {"id": run, **result})

    def write_plan(self, plan: Mapping[str, Any]) -> Path:
        """Writes what is to be run: the sweep, its cells, the command."""
        return write_json(self.folder / "sweep.json", plan)

    def plan(self) -> dict[str, Any]:
        """What `write_plan` wrote.

        Raises:
            DataError: The folder holds no sweep, or a damaged one.
        """
        path = self.folder / "sweep.json"
        if not path.is_file():
            raise DataError(
                f"{str(self.folder)!r} holds no sweep (no sweep.json); give a folder that `unmask sweep` wrote."
            )
        return _read(path, _PLAN, "the sweep", "It is no sweep of this version: run it again.")

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
        """Whether this process has the run now. The lock is the system's, and goes with the process, however it ends."""
        self.need_locks()
        path = self.folder / "locks" / f"{run}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with locking.holding(path) as mine:
            for part in (
                self.folder.glob(f"results/.{run}.json*.part") if mine else ()
            ):  # of a process killed as it wrote
                part.unlink(missing_ok=True)
            yield mine


def _read(path: Path, form: Form, what: str, advice: str = _AGAIN) -> dict[str, Any]:
    with refusing(DataError, repr(str(path)), advice):
        return dict(form(read_json(path), what))
