"""The benchmark's shapes, its curves, and its command. No assertion is about a time."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
from bench_tiny import BUDGET, DIMS, settings_for, write_config

from unmask import ConfigError
from unmask.cli import main
from unmask.lab.bench.curves import run_curve
from unmask.lab.bench.models import blueprint
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.shapes import SHAPES, Shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("tiny") / "tinybert")


def test_shapes_are_those_of_the_models_they_are_named_after():
    counts = {name: blueprint(BenchSettings(model=name)).describe()["parameters"] for name in SHAPES}
    assert counts == {
        "roberta-base": 124_647_170,  # with a head of two classes
        "minilm": 22_713_986,
        "mpnet": 109_488_002,
        "smollm2": 134_515_008,
        "llama-1b": 1_235_814_400,
        "llama-7b": 6_738_415_616,
    }


def test_models_that_cannot_be_built_are_refused(tmp_path, folder):
    with pytest.raises(ConfigError, match="not in the local hub cache"):
        blueprint(BenchSettings(model="nobody/no-such-model"))
    with pytest.raises(ConfigError, match="no readable config"):
        blueprint(BenchSettings(model=str(tmp_path)))
    with pytest.raises(ConfigError, match="at most 32 positions"):
        blueprint(BenchSettings(model=str(folder), seq_len=64))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            blueprint(BenchSettings(model=str(folder), seq_len=8, device="cuda"))


def tiny_shape(layers):
    return Shape(f"tiny{layers}", "bert", DIMS | {"num_hidden_layers": layers})


def test_the_curve_over_the_budget(folder, tmp_path):
    settings = settings_for(folder, tmp_path, curve="budget", rounds=1)
    record = run_curve(settings, lambda line: None, budgets=(10, 100, 10**9))
    assert [point["budget"] for point in record["points"]] == [10, 100]
    assert all(point[key] > 0 for point in record["points"] for key in ("static", "id3-10 between", "id3-10 selecting"))
    assert any("left out" in note for note in record["notes"])
    assert json.loads((tmp_path / "curve-budget.json").read_text())["complete"]
    assert (tmp_path / "curve-budget.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_over_the_size_stops_before_memory_runs_out(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("unmask.lab.bench.curves.SIZE_BUDGET", 50)
    settings = settings_for(folder, tmp_path, curve="size", rounds=2)
    monkeypatch.setattr(
        "unmask.lab.bench.curves.too_large",
        lambda labels, held, step, free: "is too large" if held["frozen"] > 60_000 else None,
    )
    record = run_curve(settings, lambda line: None, sizes=[tiny_shape(1), tiny_shape(2), tiny_shape(50)])
    assert [point["model"] for point in record["points"]] == ["tiny1", "tiny2"]
    assert record["points"][0]["parameters"] < record["points"][1]["parameters"]
    assert "stopped before tiny50" in record["notes"][0]
    assert (tmp_path / "curve-size.png").exists()


def test_the_cost_of_selecting_per_model(folder, tmp_path):
    settings = settings_for(folder, tmp_path, curve="selection", rounds=1)
    record = run_curve(settings, lambda line: None, models=[tiny_shape(1), tiny_shape(2)])
    for point in record["points"]:
        rows = record["rows"][point["model"]]
        ours, dense = (rows[label]["timing"]["backward"]["median"] for label in ("id3", "full"))
        assert point["share of backward"] == pytest.approx(ours / dense - 1)  # one round: its medians
    assert (tmp_path / "curve-selection.md").read_text().count("| tiny") == 2


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


def test_the_command_prints_its_tables_and_says_where_they_are(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ("--model", folder, "--batch-size", 2, "--seq-len", 8, "--budget", BUDGET, "--threads", 1, "--rounds", 1)
    code, out, err = command(*options, "--methods", "frozen,static", "--no-memory", "--output", tmp_path)
    assert (code, err) == (0, "")
    assert "round 2 of 2 (timed)" in out
    assert "tokens/s" in out
    assert f"written: {tmp_path}/bench.json" in out
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["command"].startswith("unmask bench --model")


def test_a_bad_option_is_one_clear_message():
    code, _, err = command("--dtype", "fp8")
    assert (code, err) == (1, "unmask: dtype = 'fp8'; it must be one of float32, autocast, bf16.\n")
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
