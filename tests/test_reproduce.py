"""Every table and figure of the paper as a sweep: complete, expandable, small enough when asked, honest about sources."""

from __future__ import annotations

from importlib.resources import files

import pytest

import unmask.reproduce
from unmask.errors import ConfigError
from unmask.reproduce import NAMES, load, preset, presets
from unmask.reproduce.loading import read
from unmask.settings import build
from unmask.sweeps import expand
from unmask.sweeps.cells import runs
from unmask.tasks.names import TASKS


def cells(name, scale="full"):
    sweep = load(name, scale).with_settings({"model": "m", "data_dir": "d"})
    known = [task for task in sweep.axes["task"] if task in TASKS]
    if not known:
        pytest.skip(f"{name} needs a task that is not there yet")
    return sweep, expand(sweep.only({"task": known}), rank=lambda settings: 4)


@pytest.mark.parametrize("name", NAMES)
def test_every_sweep_expands_to_runs_that_can_be_configured(name):
    sweep, full = cells(name)
    small_sweep, small = cells(name, "small")
    assert sweep.title
    assert 1 <= len(runs(small)) <= 15
    assert len(runs(small)) < len(runs(full))
    assert all(cell.settings["max_steps"] <= 60 for cell in small)
    assert all("max_steps" not in cell.settings for cell in full)
    assert small_sweep.figures == sweep.figures == ((name,) if name.startswith("fig") else ())
    assert {cell.settings["model"] for cell in full} == {"m"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("table")])
def test_tables_follow_the_papers_protocol_and_say_what_is_ours(name):
    sweep = load(name)
    assert (sweep.protocol.kind, sweep.protocol.best, len(sweep.axes["seed"])) == ("paper", 3, 4)
    assert any("this project's own" in note for note in sweep.notes)
    assert all(claim["source"] for claim in sweep.claims)


def test_the_tasks_presets_reach_the_runs_and_give_way_to_what_is_said():
    _, full = cells("table1")
    cola = next(c for c in full if c.labels["task"] == "cola" and c.labels["method"] == "id3")
    assert (cola.settings["epochs"], cola.settings["max_length"]) == (10.0, 64)
    assert "exp" not in cola.settings  # 2 is the default
    _, swept = cells("fig4")
    assert {c.settings.get("exp", 2) for c in swept} == {-2, -1, 0, 1, 2}
    longer = load("table1").with_settings({"model": "m", "epochs": 1})
    assert {c.settings["epochs"] for c in expand(longer)} == {1.0}


def test_presets_tell_the_papers_values_from_ours():
    assert preset("cola").paper == {"exp": 2, "eps": 1}
    assert preset("gsm8k").paper == {"exp": 0}
    for name, found in presets().items():
        assert set(found.paper) <= {"eps", "exp"}, "a value with a source of its own: name it there"
        assert found.source
        assert not set(found.paper) & set(found.ours), name
    settings = {**preset("rte").settings, "model": "m", "output": "o", "task": "rte", "budget": "1%"}
    assert build(settings).max_length == 256


def test_every_file_is_listed_and_ships_with_the_package():
    folder = files("unmask.reproduce").joinpath("data")
    names = {path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml")}
    assert names == {*NAMES, "table7"}


def test_the_experiments_folder_shows_the_same_files():
    from pathlib import Path

    shown = Path(unmask.reproduce.__file__).parents[3] / "experiments" / "reproduce" / "table1.yaml"
    if not shown.exists():
        pytest.skip("not a checkout")
    assert shown.read_text("utf-8") == files("unmask.reproduce").joinpath("data", "table1.yaml").read_text("utf-8")


def test_wrong_names_and_scales_are_refused():
    with pytest.raises(ConfigError, match="'table6'; there are table1"):
        load("table6")
    with pytest.raises(ConfigError, match="full or small"):
        load("table1", "tiny")
    with pytest.raises(ConfigError, match="no settings of the paper's"):
        preset("imdb")


def test_a_source_stands_in_every_file():
    for name in NAMES:
        text = files("unmask.reproduce").joinpath("data", f"{name}.yaml").read_text("utf-8")
        assert "ours" in text.split("\ntitle:")[0], f"{name} does not say what is ours"
        assert read(name)["preset"] == "table7"
