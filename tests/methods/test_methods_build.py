"""Checks that every preset builds itself by its name, and that unknown names are refused."""

from __future__ import annotations

import inspect

import pytest

import unmask
from unmask import MethodError
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.settings import build as build_config
from unmask.methods import presets as methods
from unmask.peft.config import SelectiveConfig

SETTINGS = {
    "budget": 7, "steps": 9, "eps": 0.5, "exp": 1.0, "stride": 2, "schedule": "cosine", "leaving": "kept",
    "loader": [{"x": 1}], "num_samples": 5, "criterion": "grasp", "pruned": "kept", "seed": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", methods.PRESETS)
def test_every_preset_builds_itself_from_the_settings_that_its_signature_names(name):
    preset = methods.PRESETS[name]
    method = methods.build(name, SETTINGS)
    assert method.name == name
    assert method == preset(**{key: SETTINGS[key] for key in inspect.signature(preset).parameters if key in SETTINGS})
    if name != "full":
        assert method != methods.build(name, SETTINGS | {"budget": 8})


@pytest.mark.parametrize("name", methods.PRESETS)
def test_a_setting_of_none_is_the_preset_s_default_and_a_needed_one_is_named(name):
    needed = [key for key, p in inspect.signature(methods.PRESETS[name]).parameters.items() if p.default is p.empty]
    least = {key: SETTINGS.get(key) if key in needed else None for key in SETTINGS}
    assert methods.build(name, least) == methods.PRESETS[name](**{key: SETTINGS[key] for key in needed})
    if needed:
        with pytest.raises(MethodError, match=rf"method '{name}' needs a value for {', '.join(needed)}\."):
            methods.build(name, {})


@pytest.mark.parametrize("name", ["", "ID3", "id4", "_d3", "build", "Method", None, 3, ["id3"]])
def test_an_unknown_name_is_refused_with_those_that_there_are(name):
    with pytest.raises(MethodError, match=r"unknown method .*; there are id3, repeat_d3, static_d3, .*, full\b"):
        methods.build(name, SETTINGS)


def test_settings_are_checked_as_in_the_preset():
    with pytest.raises(MethodError, match="criterion = 'x'"):
        methods.build("sparse_adapter", SETTINGS | {"criterion": "x"})
    with pytest.raises(MethodError, match="steps = 0"):
        methods.build("id3", SETTINGS | {"steps": 0})


RUN = {"model": "m", "output": "o", "task": "rte", "budget": "30"}


def run_config(**settings) -> TrainConfig:
    return TrainConfig(**RUN | settings | ({"budget": None} if settings["method"] == "full" else {}))


@pytest.mark.parametrize("name", methods.PRESETS)
def test_a_run_s_method_is_the_preset_of_that_name(name):
    into = {"into": "lora"} if name == "sparse_adapter" else {}
    method = run_config(method=name, **into).build_method(9, loader=[1])
    given = {"budget": None if name == "full" else "30", "steps": 9, "stride": 1, "loader": [1]}
    expected = methods.build(name, given)
    assert method == expected


def test_a_run_s_settings_reach_the_preset():
    config = run_config(method="id3", schedule="cosine", eps=0.5, exp=1.0, stride=3)
    assert config.build_method(9) == unmask.id3("30", 9, 0.5, 1.0, 3, "cosine")
    config = run_config(method="random_mask", seed=8)
    assert config.build_method(9) == unmask.random_mask("30", 8)


@pytest.mark.parametrize("name", ["magic", "fisch"])
def test_a_name_that_slips_past_the_configuration_is_no_other_method(name):
    config = run_config(method="id3")
    object.__setattr__(config, "method", name)
    with pytest.raises(MethodError, match=f"unknown method '{name}'"):
        config.build_method(9)
    adapter = SelectiveConfig(budget=3)
    adapter.method = name
    with pytest.raises(MethodError, match=f"unknown method '{name}'"):
        adapter.build(3)


ADAPTER_METHODS = [name for name in methods.PRESETS if name not in ("fish", "full", "sparse_adapter")]


@pytest.mark.parametrize("name", ADAPTER_METHODS)
def test_an_adapter_s_method_is_the_preset_of_that_name(name):
    config = SelectiveConfig(
        budget=30, method=name, eps=0.5, exp=1.0, stride=2, seed=5, total_steps=9, allocation="row", scope="linear"
    )
    given = {"budget": 20, "eps": 0.5, "exp": 1.0, "stride": 2, "seed": 5, "steps": 9, "schedule": "uniform"}
    assert config.build(20) == methods.build(name, given).but(allocation="row", scope=unmask.Scope("linear"))


@pytest.mark.parametrize(
    ("name", "why"),
    [("fish", "needs a loader"), ("full", "use modules_to_save"), ("sparse_adapter", "selects in the base itself")],
)
def test_an_adapter_refuses_the_methods_that_it_cannot_have(name, why):
    with pytest.raises(MethodError, match=f"method = '{name}'; .*{why}"):
        SelectiveConfig(budget=3, method=name)
    with pytest.raises(
        MethodError, match=rf"method = 'id4'; there are {', '.join(ADAPTER_METHODS)} \(did you mean 'id3'\?\)"
    ):
        SelectiveConfig(budget=3, method="id4")


FRONT_DOORS = {
    "python": lambda **given: methods.build("static_d3", {"budget": 30, **given}),
    "run": lambda **given: run_config(method="static_d3", **given).build_method(9),
    "yaml": lambda **given: build_config({**RUN, "method": "static_d3", **given}).build_method(9),
    "adapter": lambda **given: SelectiveConfig(budget=30, method="static_d3", **given).build(30),
}


@pytest.mark.parametrize("door", FRONT_DOORS)
@pytest.mark.parametrize(
    "name", [name for name in unmask.heuristic_names() if unmask.heuristic(name).needs != "calibration"]
)
def test_every_front_door_takes_every_heuristic_scope_and_allocation(door, name):
    method = FRONT_DOORS[door](heuristic=name, scope="linear", allocation="column")
    bound = unmask.heuristic(name, eps=1.0, exp=2.0) if name == "d3" else unmask.heuristic(name)
    expected = unmask.static_d3(30).but(heuristic=bound, scope=unmask.Scope("linear"), allocation="column")
    assert method.describe() | {"parameters": {}} == expected.describe() | {"parameters": {}}
    assert method.heuristic.function is bound.function


@pytest.mark.parametrize("door", FRONT_DOORS)
def test_every_front_door_refuses_unknown_words_and_parts_that_do_not_go_together(door):
    for given, why in (
        ({"heuristic": "magnitude"}, "is called 'small_magnitude' here"),
        ({"heuristic": "magic"}, "unknown heuristic 'magic'"),
        ({"heuristic": "fisher"}, "needs a calibration"),
        ({"scope": "lines"}, r"scope = 'lines'; it must be one of all, linear, bias, vector"),
        ({"allocation": "rows"}, r"allocation = 'rows'; it must be one of global, tensor, row, column"),
    ):
        with pytest.raises(unmask.UnmaskError, match=why):
            FRONT_DOORS[door](**given)


def test_a_heuristic_goes_with_the_methods_that_rank_by_d3():
    with pytest.raises(MethodError, match=r"heuristic goes with method id3, repeat_d3, static_d3; method 'pafi' has"):
        methods.build("pafi", {"budget": 3, "heuristic": "snip"})
