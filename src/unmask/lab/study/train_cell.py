"""Makes one run of a sweep: trains, from the last whole checkpoint if there is one, and collects the result."""

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

from unmask import __version__
from unmask.errors import DataError, WriteError
from unmask.lab.study.curves import read_run, read_summary
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.run_folder import RunFolder
from unmask.lab.training.series import write_series
from unmask.lab.training.settings import build
from unmask.lab.training.training import InterruptedRunError, train


def train_cell(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Trains, unless the output holds the finished run, and returns the entries of the run's result.

    Args:
        settings: Settings of `unmask.lab.training.config.TrainConfig`, without ``output``.
        output: The run's folder. Its checkpoints are removed at the end, and so is the delta of full fine-tuning,
            which is as large as the model. Where ``keep_checkpoints`` is None, the delta of each checkpoint is kept
            under ``series``; full fine-tuning has no such series.

    Returns:
        ``score`` (higher is better) and ``metric``, ``loss``, ``summary``, ``curve``, ``allocation``, ``versions``, and
        ``resumed_at``: the step of the checkpoint from which the run went on, None for a fresh run. Where the series
        is kept, ``series`` holds of each delta the ``step``, ``used`` (weights unmasked by then), ``score`` (None if
        the model was not evaluated then) and ``file`` (relative to the run's folder).

    Raises:
        InterruptedRunError: Ctrl-C stopped the run.
        UnmaskError: The run cannot work.
    """
    config, folder = build({**settings, "output": str(output)}), RunFolder(output)
    try:
        finished = read_summary(folder.summary) is not None
    except DataError:  # The run has not ended, or a kill cut the file short.
        finished = False
    resumed_at = None if finished else _train(config, folder)
    entries = read_run(output)
    assert entries is not None, "`train` has written the summary."
    entries |= {"resumed_at": resumed_at, "versions": versions()}
    whole_model = config.method == "full" and config.into is None
    if config.keep_checkpoints is None and not whole_model:
        scored = {point["step"]: point["score"] for point in entries["curve"]}
        entries["series"] = [
            {"step": step, "used": used, "score": scored.get(step), "file": str(file.relative_to(folder.path))}
            for step, used, file in write_series(folder)
        ]
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    if whole_model:
        folder.delta.unlink(missing_ok=True)
    return entries


def _train(config: TrainConfig, folder: RunFolder) -> int | None:
    """Trains to the end; returns the step from which the run went on, None for a fresh run."""
    console = Console(file=sys.stdout, force_terminal=False, width=120)
    whole, _ = folder.newest()
    if whole is not None:
        try:
            train(config, resume=True, console=console)
            return whole.step
        except (InterruptedRunError, KeyboardInterrupt, WriteError):  # A full disk must not cost the checkpoint.
            raise
        except Exception:  # A damaged checkpoint must not end a run that can be made from its start.
            traceback.print_exc()
            print("the run cannot go on from its checkpoint and starts from the beginning", flush=True)
    train(config, overwrite=True, console=console)
    return None


def versions() -> dict[str, str]:
    """Returns the versions of unmask, Python and the libraries, the device, and the number of CPU threads."""
    found = {"unmask": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    cuda = device is not None and device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else str(device or platform.machine())
    return found | {"device": name, "threads": str(torch.get_num_threads())}
