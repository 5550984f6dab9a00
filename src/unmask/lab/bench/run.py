"""Runs a benchmark: each row and draw in a fresh process, one at a time; then writes the record, the page and the figure."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from unmask.errors import MissingExtraError
from unmask.files import write_json, write_text
from unmask.gradients.choice import processor
from unmask.lab.bench.figure import save_figure
from unmask.lab.bench.models import blueprint, device_of
from unmask.lab.bench.rows import Row
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.tables import REFERENCES, StepTime, by_draw, markdown, ratio, timing
from unmask.lab.bench.worker import read_proc

_ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF")  # Peak memory depends on these.
_PACKAGES = ("torch", "transformers", "peft", "selective-optimizers", "numpy", "triton", "unmask")
Say = Callable[[str], None]
Measure = Callable[[BenchSettings, Row], Mapping[str, Any]]


@dataclass
class RowResult:
    """The results of one row over the draws so far.

    Attributes:
        row: The row.
        status: ``"waiting"``, ``"ok"``, ``"not installed"`` or ``"failed"``.
        reason: The reason why the row is not ok; otherwise None.
        steps: The timed steps of all draws.
        weights: The counts of weights and other facts, from the latest draw.
        memories: The memory figures of each draw, in MB and bytes.
    """

    row: Row
    status: str = "waiting"
    reason: str | None = None
    steps: list[StepTime] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    memories: list[dict[str, Any]] = field(default_factory=list)

    def add(self, report: Mapping[str, Any], draw: int) -> None:
        """Takes in the report of one process. An error ends the row and drops the figures of its earlier draws."""
        if "error" in report:
            self.status, self.reason = "failed", report["error"]
            self.steps.clear()
            self.memories.clear()
            return
        self.status = "ok"
        self.steps += [StepTime(**{**step, "draw": draw}) for step in report["steps"]]
        self.weights = dict(report["weights"])
        self.memories.append(dict(report["memory"]))

    def memory(self) -> dict[str, Any]:
        """Returns the memory figures of the draw whose peak is the median; of two in the middle, the lower."""
        if not self.memories:
            return {}
        figures = dict(sorted(self.memories, key=lambda memory: memory["peak_mb"])[(len(self.memories) - 1) // 2])
        if figures["saved_bytes"] and self.weights["trained"]:
            figures["bytes_per_weight"] = figures["saved_bytes"] / self.weights["trained"]
        return figures


def measure_apart(settings: BenchSettings, row: Row) -> dict[str, Any]:
    """Runs `unmask.lab.bench.worker.measure` in a fresh process; returns its report, or ``error`` with its reason."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        words = [json.dumps(asdict(settings)), row.label, str(report)]
        command = [sys.executable, "-m", "unmask.lab.bench.worker", *words]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if report.is_file():
            return json.loads(report.read_text())
    if done.returncode < 0:
        return {"error": f"the process was killed by signal {-done.returncode} (out of memory?)"}
    return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}


def figures_of(results: Sequence[RowResult], tokens: int) -> dict[str, Any]:
    """Returns every row's figures by label, as JSON values; a step has so many tokens."""
    steps = {result.row.label: result.steps for result in results if result.steps}
    return {
        result.row.label: {
            "what": result.row.what,
            "status": result.status,
            "reason": result.reason,
            "budget": result.row.budget,
            "stride": result.row.stride,
            "cycle": result.row.cycle,
            "weights": result.weights,
            "timing": timing(result.steps, result.row.stride, tokens) if result.steps else None,
            "ratios": {name: ratio(result.steps, steps[name]) for name in REFERENCES if name in steps and result.steps},
            "memory": result.memory(),
            "memory_by_draw": result.memories,
            "steps": [{**asdict(step), "total": step.total} for step in result.steps],
        }
        for result in results
    }


class Record:
    """The record of a benchmark, which is written into the output folder each time it grows.

    Attributes:
        content: The record as JSON values.
    """

    def __init__(self, settings: BenchSettings, name: str, say: Say, command: str | None, measure: Measure) -> None:
        self.settings, self.name, self.say, self.measure = settings, name, say, measure
        self.content: dict[str, Any] = {
            "complete": False,
            "command": command,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": asdict(settings),
            "machine": describe_machine(device_of(settings), settings.threads),
            "model": None,
            "rows": {},
        }

    def save(self) -> None:
        write_json(Path(self.settings.output, f"{self.name}.json"), self.content)

    def run_rows(self, settings: BenchSettings, tokens: int, figures: dict[str, Any]) -> dict[str, RowResult]:
        """Measures every row in every draw. The first row of a draw is another one each time.

        A row whose package is not installed is not tried. A row that fails is left out from then on; the others go on. After
        every process the rows' ``figures`` are brought up to date and the record is written, so that a run that is stopped
        leaves them.
        """
        results = [RowResult(row) for row in settings.rows()]
        for result in results:
            if result.row.missing:
                result.status, result.reason = "not installed", result.row.missing
        figures.update(figures_of(results, tokens))
        self.save()
        start, total = time.perf_counter(), settings.draws * len(results)
        for number in range(total):
            draw, place = divmod(number, len(results))
            result = results[(place + draw) % len(results)]
            if result.reason:
                continue
            result.add(self.measure(settings, result.row), draw)
            figures.update(figures_of(results, tokens))
            self.save()
            if result.reason:
                progress = f"{result.status}: {result.reason}"
            else:
                step, peak = list(by_draw(result.steps).values())[-1], result.memories[-1]["peak_mb"]
                progress = f"{step:.4g} s a step, peak {peak:,.0f} MB"
            left = (time.perf_counter() - start) / (number + 1) * (total - number - 1)
            self.say(f"draw {draw + 1} of {settings.draws}, {result.row.label}: {progress} (about {left:.0f} s to go)")
        return {result.row.label: result for result in results}

    def finish(self) -> dict[str, Any]:
        """Writes the complete record, its page and its figure. Without matplotlib it leaves out the figure and says so."""
        self.content["complete"] = True
        self.save()
        folder = Path(self.settings.output)
        write_text(folder / f"{self.name}.md", markdown(self.content))
        try:
            save_figure(self.content, folder / f"{self.name}.png")
        except MissingExtraError as error:
            self.say(f"{self.name}.png was not drawn: {error}")
        return self.content


def run_bench(
    settings: BenchSettings, say: Say = print, command: str | None = None, measure: Measure = measure_apart
) -> dict[str, Any]:
    """Measures every row and writes ``bench.json``, ``bench.md`` and ``bench.png`` into the output folder.

    Args:
        settings: The run, without a curve.
        say: Takes lines of progress.
        command: The command line, for the record.
        measure: Measures a row; by default in a fresh process.

    Returns:
        The record, as ``bench.json`` holds it.

    Raises:
        ConfigError: The model or the device cannot be had.
        MissingExtraError: transformers is not installed.
    """
    record = Record(settings, "bench", say, command, measure)
    record.content["model"] = model = blueprint(settings).describe()
    record.run_rows(settings, model["tokens"], record.content["rows"])
    return record.finish()


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Returns the hardware, the versions, and the commit if unmask runs from a git checkout, as JSON values."""
    total = read_proc("meminfo", r"^MemTotal:\s+(\d+) kB")
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in versions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": int(total) * 1024 if total else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "allocator": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_ALLOCATOR)},
    }


def _commit() -> str | None:
    """Returns the commit, with a plus sign if tracked files differ from it; None outside a checkout of unmask."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # This fails in a checkout of another project.
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
