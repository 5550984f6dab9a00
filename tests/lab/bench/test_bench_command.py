"""Tests the command ``unmask bench``. No assertion is about a time."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest
from bench_tiny import BUDGET, write_config

from unmask.cli import main


def command(*words):
    out, err, code = io.StringIO(), io.StringIO(), 0
    patch = pytest.MonkeyPatch()
    with patch.context() as p, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        p.setattr(sys, "argv", ["unmask", "bench", *map(str, words)])
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_the_command_prints_its_tables_and_names_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = write_config(tmp_path / "tinybert")
    options = ("--model", folder, "--batch-size", 2, "--seq-len", 8, "--budget", BUDGET, "--threads", 1, "--draws", 1)
    code, out, err = command(*options, "--methods", "static", "--output", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "draw 1 of 1, static: " in out
    assert "tokens/s" in out
    assert "peak MB" in out
    assert f"written: {tmp_path}/out/bench.json" in out
    record = json.loads((tmp_path / "out/bench.json").read_text())
    assert record["command"].startswith("unmask bench --model")
    assert record["rows"]["static"]["weights"]["trained"] == BUDGET


def test_a_bad_option_is_one_clear_message():
    code, _, err = command("--dtype", "fp8")
    assert (code, err) == (1, "unmask: --dtype 'fp8'; it must be one of float32, autocast, bf16.\n")
    code, _, err = command("--curve", "size", "--model", "minilm")
    assert (code, "leave --model out" in err) == (1, True)


def test_help_and_bad_options_import_no_torch():
    code = """
import sys
from unmask.lab.bench.settings import BenchSettings
from unmask.errors import ConfigError
try:
    BenchSettings(methods="lorra")
except ConfigError:
    pass
import unmask.cli.bench, unmask.cli.app
assert not {"torch", "transformers", "peft", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
