"""Tests that options, help and the reference page come from the fields of the settings classes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import unmask
from unmask.cli.app import app
from unmask.cli.options import SweepOptions
from unmask.cli.reference import filled, main
from unmask.errors import ConfigError
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.fields import converted, settings_of

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
RUN = ("--model", "m", "--output", "o", "--task", "rte", "--budget", "1%")


def configured(monkeypatch: pytest.MonkeyPatch, *words: str) -> TrainConfig:
    """Returns the configuration that `unmask train` passes to the run."""
    found: list[TrainConfig] = []
    module = pytest.importorskip("unmask.lab.training.training")
    monkeypatch.setattr(module, "train", lambda config, **_: found.append(config))
    done = CliRunner().invoke(app, ["train", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found[0]


@pytest.mark.parametrize(
    ("command", "settings"),
    [("train", TrainConfig), ("bench", BenchSettings), ("sweep", SweepOptions), ("reproduce", SweepOptions)],
)
def test_every_setting_is_an_option_with_its_help(command, settings):
    shown = " ".join(CliRunner().invoke(app, [command, "--help"], terminal_width=1000).output.split())
    for field in dataclasses.fields(settings):
        assert f" --{field.name.replace('_', '-')} " in shown
        assert field.metadata.get("help", "") in shown


def test_every_setting_of_a_run_has_a_help_text():
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--lr", "3e-3", "--bf16", "--include", "query,value"), {"lr": 3e-3, "bf16": True, "include": ("query", "value")}),
        (("--no-bf16", "--keep-checkpoints", "none", "--dense", "none"), {"bf16": False, "keep_checkpoints": None, "dense": ()}),
        (("--method", "id3", "--heuristic", "snip", "--allocation", "row"), {"heuristic": "snip", "allocation": "row"}),
        (("--seed", "1", "--set", "seed=2"), {"seed": 2}),
        ((), {}),
    ],
)  # fmt: skip
def test_options_make_the_configuration_that_python_makes(monkeypatch, tmp_path, words, expected):
    monkeypatch.chdir(tmp_path)
    method = {"method": "id3"} if "id3" in words else {}
    plain = {"model": "m", "output": "o", "task": "rte", "budget": "1%"}
    assert configured(monkeypatch, *RUN, *words) == TrainConfig(**plain | method | expected)


def test_an_option_overrides_the_file_and_set_overrides_the_option(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("lr: 0.1\nseed: 3\nepochs: 7\n")
    config = configured(monkeypatch, *RUN, "--config", "run.yaml", "--lr", "0.2", "--seed", "4", "--set", "seed=5")
    assert (config.lr, config.seed, config.epochs) == (0.2, 5, 7.0)


def test_a_value_of_another_type_is_refused_by_name_before_torch_is_imported():
    code = (
        "import sys\nfrom unmask.cli import main\n"
        f"sys.argv = ['unmask', 'train', *{RUN!r}, '--batch-size', 'many']\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (1, "False")
    assert done.stderr.strip() == "unmask: --batch-size 'many' is no int."


@pytest.mark.parametrize("command", [(), ("train",), ("bench",), ("sweep",)])
def test_help_waits_for_no_torch(command):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom unmask.cli.app import app\n"
        f"result = CliRunner().invoke(app, [*{command!r}, '--help'])\n"
        "print(result.exit_code, '--help' in result.output, *(name in sys.modules for name in ('torch', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "False", "False"]


def test_a_heuristic_of_a_plugin_is_known_to_the_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import unmask\nSCALE = 3\n"
        "unmask.register_heuristic('of_a_plugin', lambda w, g: SCALE * g.abs(), overwrite=True)\n"
    )
    words = (*RUN, "--method", "id3", "--heuristic", "of_a_plugin")
    refused = CliRunner().invoke(app, ["train", *words])
    assert isinstance(refused.exception, ConfigError)
    assert "unknown heuristic 'of_a_plugin'" in str(refused.exception)
    config = configured(monkeypatch, *words, "--plugin", "mine.py")
    torch = pytest.importorskip("torch")
    score = config.build_method(5).heuristic.score(torch.ones(2), torch.tensor([-1.0, 2.0]))
    assert score.tolist() == [3.0, 6.0]
    assert configured(monkeypatch, *words, "--set", "plugin=mine.py") == config


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("absent.py", None, "is not a Python file"),
        ("notes.txt", "", "is not a Python file"),
        ("broken.py", "1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("taken.py", "import unmask\nunmask.register_heuristic('d3', print)", "heuristic 'd3' is the library's own"),
    ],
)
def test_a_plugin_that_cannot_be_run_is_refused(tmp_path, name, text, why):
    if text is not None:
        (tmp_path / name).write_text(text)
    done = CliRunner().invoke(app, ["train", *RUN, "--plugin", str(tmp_path / name)])
    assert isinstance(done.exception, ConfigError)
    assert why in str(done.exception)


def test_the_reference_page_is_up_to_date(tmp_path):
    assert main(["--check", str(PAGE)]) == 0
    stale = tmp_path / "cli.md"
    stale.write_text(PAGE.read_text().replace("| `seed` | 0 |", "| `seed` | 1 |"))
    assert main(["--check", str(stale)]) == 1
    assert main(["--write", str(stale)]) == 0
    assert stale.read_text() == PAGE.read_text()
    with pytest.raises(ValueError, match="no line '<!-- table"):
        filled("a page without a place for the table")


def test_the_reference_page_names_every_setting_and_every_word():
    page = PAGE.read_text()
    for setting in settings_of(TrainConfig).values():
        assert f"| `{setting.name}` |" in page
        if not setting.types:
            assert all(f"`{word}`" in page for word in setting.words)


def test_bench_reads_its_options_as_texts():
    found = BenchSettings(**converted(BenchSettings, {"budget": "1000", "dropout": "0.1", "methods": "id3,lora"}))
    assert (found.budget, found.dropout, found.methods) == (1000, 0.1, "id3,lora")
    with pytest.raises(ConfigError, match=r"steps = '1\.5' is no int"):
        converted(BenchSettings, {"steps": "1.5"})


@pytest.mark.parametrize("option", ["workers", "threads"])
def test_a_sweep_without_workers_or_threads_is_refused_before_its_runs_are_listed(option):
    words = ["reproduce", "table4", "--model", "m", "--dry-run", f"--{option}", "0"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError)
    assert f"{option} = 0; it must be 1 or more" in str(done.exception)


def test_methods_lists_every_preset_and_part():
    shown = CliRunner().invoke(app, ["methods"]).output
    assert all(
        name in shown for name in (*unmask.PRESETS, *unmask.heuristic_names(), *unmask.SCHEDULES, "column", "vector")
    )
