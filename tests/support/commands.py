"""Runs `unmask` as a user types it, in this process, and holds the words of a short training run."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from unmask.cli import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*words: object, cwd: Path, check: bool = True) -> Done:
    """Runs `unmask WORDS` in this process, because a new process waits seconds for its imports."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    patch = pytest.MonkeyPatch()
    with patch.context() as p, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        p.chdir(cwd)
        p.setattr(sys, "argv", ["unmask", *map(str, words)])
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
    if check:
        assert code == 0, err.getvalue()
    return Done(code, out.getvalue(), err.getvalue())


TRAIN = (
    "train",
    "--model",
    "base",
    "--data",
    "train.csv",
    "--eval",
    "dev.csv",
    "--text",
    "review",
    "--label",
    "verdict",
    "--method",
    "id3",
)


def train_words(output: str, *more: object) -> tuple[object, ...]:
    return (*TRAIN, "--budget", 120, "--lr", 0.05, "--max-steps", 24, "--batch-size", 16, "--output", output, *more)
