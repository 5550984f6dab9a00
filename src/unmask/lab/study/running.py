"""What a worker does for one run: trains, going on from the last whole checkpoint, and gathers the run's record."""

from __future__ import annotations

import platform
import shutil
import sys
import traceback
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unmask.errors import DataError, WriteError
from unmask.lab.study.curves import curve, read_allocation, read_metrics, read_summary, scores
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.run_folder import RunFolder
from unmask.lab.training.series import write_series
from unmask.lab.training.settings import build
from unmask.lab.training.training import InterruptedRunError, train
from unmask.version import __version__


def run_cell(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Trains, unless the output holds the finished run; the entries of its result.

    Args:
        settings: Of `unmask.lab.training.config.TrainConfig`, without ``output``.
        output: The run's folder. Its checkpoints are removed at the end, and so is the delta of full fine-tuning, which is as
            large as the model. With ``keep_checkpoints`` none, the delta of each checkpoint is kept under ``series``, but not
            those of full fine-tuning.

    Returns:
        ``score`` (higher is better) and ``metric``, ``loss``, ``summary``, ``curve``, ``allocation``, ``versions``, and
        ``resumed_at``: the step of the checkpoint that it went on from. Where the series is kept, ``series`` too: the
        ``step``, ``used`` (weights unmasked by then), ``score`` (None if it was not evaluated then) and ``file`` (relative
        to the run's folder) of each delta.

    Raises:
        InterruptedRunError: Ctrl-C.
        UnmaskError: The run cannot work.
    """
    config, folder = build({**settings, "output": str(output)}), RunFolder(output)
    resumed_at = None
    if _summary(folder) is None:
        resumed_at = _train(config, folder)
    summary = _summary(folder)
    assert summary is not None, "written by train"
    points, whole_model = curve(read_metrics(folder.metrics), summary), config.method == "full" and config.into is None
    series = {}
    if config.keep_checkpoints is None and not whole_model:
        series = {"series": _series(folder, {point["step"]: point["score"] for point in points})}
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    if whole_model:
        folder.delta.unlink(missing_ok=True)
    return {
        **scores(summary),
        "resumed_at": resumed_at,
        "summary": summary,
        "curve": points,
        **series,
        "allocation": read_allocation(folder.allocation),
        "versions": versions(),
    }


def _series(folder: RunFolder, scored: Mapping[int, float]) -> list[dict[str, Any]]:
    """Writes the deltas of the run's checkpoints, and returns what the result says of each."""
    return [
        {"step": step, "used": used, "score": scored.get(step), "file": str(file.relative_to(folder.path))}
        for step, used, file in write_series(folder)
    ]


def _train(config: TrainConfig, folder: RunFolder) -> int | None:
    """Trains to the end; the step that it went on from, None for a fresh start."""
    console = Console(file=sys.stdout, force_terminal=False, width=120)
    whole, _ = folder.newest()
    if whole is not None:
        try:
            train(config, resume=True, console=console)
            return whole.step
        except (InterruptedRunError, KeyboardInterrupt, WriteError):  # on a full disk what is whole is not given up
            raise
        except Exception:  # a damaged checkpoint must not end a run that can be made anew
            traceback.print_exc()
            print("the run could not go on from its checkpoint, and is started anew", flush=True)
    train(config, overwrite=True, console=console)
    return None


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"unmask": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = (
        torch.cuda.get_device_name()
        if device is not None and device.type == "cuda"
        else str(device or platform.machine())
    )
    return found | {"device": name, "threads": str(torch.get_num_threads())}


def _summary(folder: RunFolder) -> dict[str, Any] | None:
    try:
        return read_summary(folder.summary)
    except DataError:  # not there yet, or a kill cut it short
        return None
