"""The folder of a sweep: one JSON file for each run, written in one step, so that a kill leaves no half file."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError, DataError
from unmask.files import write_json
from unmask.lab.study.forms import PLAN, RESULT, STATES
from unmask.lab.training import locking
from unmask.reading import Form, read_json, refusing

Result = dict[str, Any]
Results = Mapping[str, Result]
"""The results of the runs that have ended, by run id."""
_AGAIN = "To make that run again, remove the file."


def after_training(result: Result) -> Mapping[str, Any]:
    """Returns a run's loss and metrics after training, by their names."""
    found: Mapping[str, Any] = (result.get("summary") or {}).get("after", {})
    return found


def figure_of(result: Result, name: str) -> float | None:
    """Returns a run's ``"score"``, its ``"loss"``, or a metric after training.

    It returns None for a run that failed, and for a figure that is missing or not finite.
    """
    value = (result if name in ("score", "loss") else after_training(result)).get(name)
    if result["status"] != "done" or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


class Store:
    """The folder of a sweep.

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
        return _read(path, RESULT, "the result") if path.is_file() else None

    def results(self) -> dict[str, Result]:
        """Returns all results, by id.

        Raises:
            DataError: A result cannot be read, or it is damaged.
        """
        return {path.stem: _read(path, RESULT, "the result") for path in sorted(self.folder.glob("results/*.json"))}

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
        return _read(path, PLAN, "the sweep", "Another version of unmask wrote it: run the sweep again.")

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
        """Yields True if this process holds the run's lock. The system frees the lock when the process ends."""
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
