"""Runs `unmask train` for six steps with every kill point known, and goes on after each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kill_points import Content, Recorder, hearing, restore
from rich.console import Console
from tiny import tiny_model, toy_csv

from unmask.errors import ConfigError
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.run_folder import RunFolder
from unmask.lab.training.training import Outcome, train


def small_world(root: Path) -> TrainConfig:
    """Makes the base and data of a run, and its settings; of two checkpoints in turn, one is kept."""
    tiny_model(root / "base")
    toy_csv(root / "train.csv", 16, seed=0)
    toy_csv(root / "dev.csv", 8, seed=1)
    return TrainConfig(
        model=str(root / "base"),
        output=str(root / "whole"),
        data=str(root / "train.csv"),
        eval=str(root / "dev.csv"),
        text="review",
        label="verdict",
        method="id3",
        budget="60",
        lr=0.05,
        max_steps=6,
        batch_size=4,
        eval_steps=2,  # and so a checkpoint
        keep_checkpoints=1,
        logging_steps=1,
    )


def go(config: TrainConfig, output: Path, **how: Any) -> Outcome:
    """Trains into a folder without output."""
    return train(replace(config, output=str(output)), console=Console(quiet=True), **how)


def recorded(config: TrainConfig, **how: Any) -> Recorder:
    """Trains, and records every state of the output folder on the way."""
    recorder = Recorder(Path(config.output))
    with hearing(recorder.folder, recorder):
        go(config, recorder.folder, **how)
    return recorder


def result(folder: Path) -> tuple[bytes, list[dict]]:
    """Returns the results of a run without clock times: the delta's bytes and the rows of metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steady = [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in rows]
    return (folder / "delta.safetensors").read_bytes(), [row for row in steady if "train_loss" not in row]


def newest_step(folder: Path) -> int:
    """Returns the step that the run could go on from; -1 for none, 99 for a run that is finished."""
    run = RunFolder(folder)
    if run._finished() is not None:
        return 99
    whole, _ = run.newest()
    return -1 if whole is None else whole.step


def go_on(config: TrainConfig, state: Content, folder: Path) -> str:
    """Goes on after a kill as a user would, by ``--resume`` or as the refusal advises; returns which of them it was."""
    restore(state, folder)
    try:
        go(config, folder, resume=True)
        return "resumed"
    except ConfigError as error:
        message = str(error)
    overwrite = "Start again with --overwrite" in message
    assert overwrite or "start without --resume" in message, message
    go(config, folder, overwrite=overwrite)
    return "started again"
