"""Tests the sweeps of the paper's tables and figures: their runs under both presets, in full and at the small scale."""

from __future__ import annotations

from importlib.resources import files

import pytest
from commands import run
from helpers import ROOT

from unmask.cli.sweeping import with_protocol
from unmask.errors import ConfigError
from unmask.lab.study import expand, parse
from unmask.lab.study.cells import distinct
from unmask.lab.study.choosing import due
from unmask.lab.study.paper import NAMES, load, shrunk
from unmask.lab.tasks.names import TASKS
from unmask.lab.training.paper import PRESETS, preset, presets
from unmask.lab.training.settings import build

FIGURES = tuple(name for name in NAMES if name.startswith("fig"))


def cells(name, scale="full", which="paper"):
    sweep = load(name, scale, which).with_settings({"model": "m", "data_dir": "d"})
    return sweep, expand(sweep)


@pytest.mark.parametrize("which", PRESETS)
@pytest.mark.parametrize("name", NAMES)
def test_every_sweep_expands_to_runs_that_can_be_configured(name, which):
    sweep, full = cells(name, "full", which)
    small_sweep, small = cells(name, "small", which)
    assert sweep.title
    made = distinct(due(small, small_sweep.protocol, small_sweep.choice, {}))
    assert 1 <= len(made) <= (16 if name in FIGURES else 20)
    # The full table 5 and figure 7 have no more runs than the small ones.
    assert len(distinct(small)) < len(distinct(full)) or name in ("table5", "fig7")
    assert all(cell.settings["max_steps"] <= 60 for cell in small)
    assert all(cell.settings["eval_steps"] < cell.settings["max_steps"] for cell in small)
    assert all(cell.settings.get("max_length", 128) <= 128 for cell in small)
    assert all("max_steps" not in cell.settings for cell in full)
    assert small_sweep.figures == sweep.figures == ((name,) if name in FIGURES else ())
    assert {cell.settings["model"] for cell in full} == {"m"}


@pytest.mark.parametrize("name", NAMES)
def test_the_small_scale_has_two_of_the_papers_pairs_at_most(name):
    sweep, found = cells(name, "small")
    made = due(found, sweep.protocol, sweep.choice, {})
    pairs = {(c.labels["lr"], c.labels["seed"]) for c in made if c.labels["method"] != "full"}
    known = preset(sweep.axes["task"][0])
    assert pairs <= set(zip(known.rates[1:3] or known.rates, known.seeds[1:3] or known.seeds, strict=True))
    assert {c.labels["lr"] for c in made if c.labels["method"] == "full"} <= {"7e-6", "1e-5"}


@pytest.mark.parametrize("name", NAMES)
def test_the_tuned_preset_replaces_all_of_the_papers_settings(name):
    sweep, found = cells(name, which="tuned")
    known = preset(sweep.axes["task"][0], "tuned")
    assert (sweep.protocol.kind, sweep.choice.setting, sweep.choice.seeds, sweep.choice.by) == (
        "seeds",
        "lr",
        (0,),
        "loss",
    )
    assert sweep.axes["seed"] == known.seeds == (0, 1, 2, 3)
    assert not any("warmup" in cell.settings for cell in found)  # The default is 0.06.
    into = sweep.settings.get("into")
    for row in sweep.rows:
        assert row.grid == {"lr": known.grid(row.settings.get("method", "id3"), into)}
    for cell in found:
        assert cell.settings.get("epochs", 3.0) == preset(cell.settings["task"], "tuned").settings["epochs"]
    assert sweep.notes[:-1] == load(name).notes[:-1]
    assert "this project's own, not the paper's" in sweep.notes[-1]
    assert (sweep.claims, sweep.title) == (load(name).claims, load(name).title)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("table5", "fig7", "fig8", "fig9")])
def test_under_the_protocol_seeds_the_papers_rates_are_tried_on_its_first_seed(name):
    sweep, found = cells(name)
    sweep = with_protocol(sweep, "seeds")
    first = due(found, sweep.protocol, sweep.choice, {})
    assert {cell.labels["seed"] for cell in first} == {6}
    assert len(first) == len(found) / 4


def test_the_presets_reach_the_runs_and_given_settings_override_them():
    _, full = cells("table1")
    cola = next(c for c in full if c.labels["task"] == "cola" and c.labels["method"] == "id3")
    assert (cola.settings["epochs"], cola.settings["max_length"], cola.settings["eval_steps"]) == (20.0, 256, 200)
    assert "exp" not in cola.settings  # The default is 2.
    longer = load("table1").with_settings({"model": "m", "epochs": 1})
    assert {c.settings["epochs"] for c in expand(longer)} == {1.0}
    other = load("table4").with_axis("task", ["wnut17"]).with_settings({"model": "m"})
    assert {(c.settings["epochs"], c.settings["max_length"]) for c in expand(other)} == {(20.0, 384)}


def test_the_settings_of_a_file_override_those_of_its_preset():
    _, found = cells("table5")  # The preset of its task has lora_r = 8.
    assert {c.labels["method"]: c.settings.get("lora_r") for c in found} == {
        "lora_r32": 32, "lora_r2": 2, "lora_r4": 4, "pafi+lora": 32, "id3+lora": 32,
    }  # fmt: skip
    assert {c.settings["lora_alpha"] for c in found} == {16.0}


def test_every_task_with_a_family_has_both_presets():
    trained = {task for task in TASKS if task not in ("ner", "svamp", "multiarith", "addsub", "aqua", "singleeq")}
    for which in PRESETS:
        assert set(presets(which)) == trained
        for task, found in presets(which).items():
            assert (found.name, found.task) == (which, task)
            assert found.source
            settings = {**found.run(), "model": "m", "output": "o", "task": task, "budget": "1%"}
            config = build(settings)
            assert config.max_length == found.settings["max_length"]
            assert config.lr == float(found.rates[:2][-1])
    assert all(found.unsaid for found in presets("paper").values())
    assert preset("cola", "tuned").unsaid == ()


def test_the_tuned_preset_has_a_grid_for_each_method():
    found = preset("cola", "tuned")
    assert found.grid("id3") == found.grid("fish") == found.grid("repeat_d3") == ("3e-4", "1e-3", "3e-3")
    assert found.grid("random_mask") == ("3e-3", "1e-2", "3e-2")
    assert found.grid("full") == ("1e-5", "2e-5", "5e-5")
    assert found.grid("full", into="lora") == found.rates
    assert found.grid("id3", into="lora") == ("1e-3", "3e-3", "1e-2")
    assert (found.run("pafi")["lr"], found.run("pafi")["seed"]) == ("3e-3", 1)


def test_every_file_is_listed_and_ships_with_the_package():
    for package, names in (("unmask.lab.study", NAMES), ("unmask.lab.training", PRESETS)):
        folder = files(package).joinpath("data")
        found = {path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml")}
        assert found == set(names)


def test_the_experiments_folder_shows_the_same_files():
    shown = ROOT / "experiments" / "reproduce" / "table1.yaml"
    if not shown.exists():
        pytest.skip("this is not a checkout")
    assert shown.read_text("utf-8") == files("unmask.lab.study").joinpath("data", "table1.yaml").read_text("utf-8")


def test_wrong_names_scales_and_presets_are_refused():
    with pytest.raises(ConfigError, match="'table6'; there are table1"):
        load("table6")
    with pytest.raises(ConfigError, match="full or small"):
        load("table1", "tiny")
    with pytest.raises(ConfigError, match="preset = 'ours'; it must be paper or tuned"):
        load("table1", preset="ours")
    with pytest.raises(ConfigError, match="'paper' has no settings for task 'imdb'; it has some for rte, mrpc"):
        preset("imdb")


def test_the_command_lists_the_papers_runs(tmp_path):
    words = ("reproduce", "table4", "--model", "m", "--dry-run")
    assert "table4: 40 runs" in run(*words, cwd=tmp_path).stdout
    assert "table4: 10 runs" in run(*words, "--scale", "small", cwd=tmp_path).stdout
    assert "table4: 120 runs" in run(*words, "--preset", "tuned", cwd=tmp_path).stdout
    refused = run(*words, "--preset", "ours", cwd=tmp_path, check=False)
    assert (refused.returncode, "it must be paper or tuned" in refused.stderr) == (1, True)
    words = ("reproduce", "table4", "--model", "m", "--engine", "dask")
    refused = run(*words, cwd=tmp_path, check=False)
    assert (refused.returncode, "--engine 'dask'; it must be local or ray" in refused.stderr) == (1, True)
    assert not list(tmp_path.rglob("sweep.json"))


def test_the_small_scale_does_not_override_a_methods_settings():
    """A LoRA of rank 2 once got the rank of the small scale, and so seven times the budget at which it was compared."""
    values = {
        "settings": {"model": "m", "task": "rte", "budget": "1%"},
        "methods": {"thin": {"settings": {"lora_r": 2}}, "other": {}},
    }
    cells = expand(shrunk(parse(values), {"settings": {"lora_r": 8, "max_steps": 5}}))
    assert [(c.settings.get("lora_r", 8), c.settings["max_steps"]) for c in cells] == [(2, 5), (8, 5)]
