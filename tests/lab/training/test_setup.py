"""Tests the method and the optimizer that the settings of a run make."""

from __future__ import annotations

import pytest
from helpers import mlp

import unmask
from unmask import ConfigError
from unmask.lab.training.settings import build
from unmask.lab.training.setup import optimizer_from

RUN = {"model": "m", "output": "o", "task": "sst2", "budget": "30", "method": "id3"}


def method(**settings):
    return build(RUN | settings).build_method(40)


@pytest.mark.parametrize("name", unmask.heuristic_names())
def test_a_run_knows_every_heuristic_that_needs_no_calibration(name):
    if unmask.heuristic(name).needs == "calibration":
        with pytest.raises(ConfigError, match=f"the {name} heuristic needs a calibration"):
            method(method="id3", heuristic=name)
    else:
        assert method(method="id3", heuristic=name).heuristic.name == name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, unmask.id3("30", 40)),
        ({"allocation": "column"}, unmask.id3("30", 40).but(allocation="column")),
        ({"heuristic": "snip"}, unmask.id3("30", 40).but(heuristic=unmask.heuristic("snip"))),
        ({"heuristic": "d3", "exp": "1"}, unmask.id3("30", 40, exp=1.0)),
        ({"heuristic": "random", "seed": "4"}, unmask.id3("30", 40).but(heuristic=unmask.heuristic("random", seed=4))),
        ({"schedule": "at-once"}, unmask.id3("30", 40, schedule="at-once")),
    ],
)  # fmt: skip
def test_settings_make_the_method_that_python_makes(settings, expected):
    assert method(**settings).describe() == expected.describe()
    assert str(method(**settings).budget) == str(expected.budget)


@pytest.mark.parametrize(
    "settings",
    [
        {"heuristic": "fisher"},
        {"method": "pafi", "heuristic": "snip"},
        {"allocation": "rows"},
        {"bias_correction": "row"},
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings):
    name = next(name for name in settings if name != "method")
    with pytest.raises(ConfigError, match=name):
        method(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "regrow"},
        {"method": "lift"},
        {"heuristic": "lift"},
        {"normalise": "row-column"},
        {"drop": "0.1"},
        {"rank": "8"},
        {"lr_scale": "row-column"},
        {"slot_warmup": "3"},
    ],
    ids=str,
)
def test_removed_settings_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        method(**settings)


def test_a_criterion_that_does_not_go_with_an_allocation_is_refused():
    with pytest.raises(ConfigError, match="synflow"):
        method(method="sparse_adapter", into="lora", criterion="synflow", allocation="column")


def test_settings_make_the_optimizer():
    selection = unmask.select(mlp(), unmask.pafi(30))
    settings = {
        "lr": "0.5",
        "weight_decay": "0.1",
        "bias_correction": "entry",
    }
    group = optimizer_from(build(RUN | settings), selection).param_groups[0]
    wanted = {"lr": 0.5, "weight_decay": 0.1, "bias_correction": "entry"}
    assert {name: group[name] for name in wanted} == wanted


def test_tensors_outside_the_budget_can_have_another_rate():
    selection = unmask.select(mlp(), unmask.random_mask(5), dense="^2")
    settings = {"method": "random_mask", "lr": 0.5, "weight_decay": 0.1}
    ours, dense = optimizer_from(build(RUN | settings | {"dense_lr": "0.01"}), selection).param_groups
    assert (ours["lr"], dense["lr"], dense["weight_decay"]) == (0.5, 0.01, 0.1)
    assert ours["params"] == [selection.values]
    assert {id(p) for p in ours["params"] + dense["params"]} == {id(p) for p in selection.parameters()}
    (one,) = optimizer_from(build(RUN | settings), selection).param_groups
    assert {id(p) for p in one["params"]} == {id(p) for p in selection.parameters()}
    alone = optimizer_from(build(RUN | settings | {"dense_lr": "0.01"}), unmask.select(mlp(), unmask.random_mask(5)))
    assert [group["lr"] for group in alone.param_groups] == [0.5]
    whole = unmask.select(mlp(), unmask.full())
    settings = {"method": "full", "budget": None, "lr": 0.5, "dense_lr": 0.01}
    ours, head = optimizer_from(build(RUN | settings), whole, {"4.weight", "4.bias"}).param_groups
    assert (ours["lr"], len(ours["params"]), head["lr"], sorted(p.numel() for p in head["params"])) == (
        0.5,
        4,
        0.01,
        [6, 36],
    )


OWN = {key: value for key, value in RUN.items() if key != "task"} | {"data": "a.csv"}


def test_the_settings_of_own_texts_are_checked_before_the_file_is_read():
    config = build(OWN | {"num_labels": "1", "delimiter": "tab", "encoding": "latin-1", "drop_missing": "yes"})
    assert (config.num_labels, config.drop_missing) == (1, True)
    for settings, message in (
        ({"delimiter": ";;"}, "must be one character"),
        ({"encoding": "nosuch"}, "no such encoding"),
        ({"num_labels": "0"}, "num_labels = 0; it must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(OWN | settings)
    for name, value in (("num_labels", 3), ("delimiter", ";"), ("encoding", "cp1252"), ("drop_missing", True)):
        with pytest.raises(ConfigError, match=f"{name}: for texts of your own only"):
            build(RUN | {name: value})
