"""Where a sweep keeps its results: one JSON per run, written in one step, so that a kill leaves none in pieces. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unmask import locking
from unmask.errors import ConfigError, DataError
from unmask.writing import write_json

Result = dict[str, Any]
STATES = ("done", "failed")


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

    def run_folder(self, run: str) -> Path:
        return self.folder / "runs" / run

    def log_path(self, run: str) -> Path:
        return self.folder / "logs" / f"{run}.log"

    def result(self, run: str) -> Result | None:
        """A run's result; None for a run that has not ended."""
        path = self.result_path(run)
        return _read(path) if path.is_file() else None

    def results(self) -> dict[str, Result]:
        """All results, by id."""
        found = sorted(self.folder.glob("results/*.json"))
        return {path.stem: _read(path) for path in found}

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
            DataError: The folder holds no sweep.
        """
        path = self.folder / "sweep.json"
        if not path.is_file():
            raise DataError(
                f"{str(self.folder)!r} holds no sweep (no sweep.json); give a folder that `unmask sweep` wrote."
            )
        return _read(path)

    @contextlib.contextmanager
    def lock(self, run: str) -> Iterator[bool]:
        """Whether this process has the run now. The lock is the system's, and goes with the process, however it ends."""
        if not locking.POSSIBLE:
            raise ConfigError("sweeps need POSIX file locks, which this system has not; run them on Linux or macOS.")
        path = self.folder / "locks" / f"{run}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with locking.holding(path) as mine:
            for part in (
                self.folder.glob(f"results/.{run}.json*.part") if mine else ()
            ):  # of a process killed as it wrote
                part.unlink(missing_ok=True)
            yield mine


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read ({error}); remove it to run that run again.") from error
    if not isinstance(value, dict):
        raise DataError(f"{str(path)!r} holds no result; remove it to run that run again.")
    return value
