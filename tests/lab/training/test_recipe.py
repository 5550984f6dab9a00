"""Tests the recipe, which a run without a method takes, and the presets that can take its place."""

import pytest
from helpers import mlp

import unmask
from unmask.errors import ConfigError
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.paper import under_preset
from unmask.lab.training.recipe import RECIPE, head_rate, rate
from unmask.lab.training.settings import build
from unmask.lab.training.setup import with_rates

RUN = {"model": "m", "output": "o", "task": "rte", "budget": "1%"}


def test_without_a_method_given_settings_override_the_recipe():
    config = build(under_preset(None, {**RUN, "lr": "3e-3"}))
    assert {key: getattr(config, key) for key in RECIPE} == {**RECIPE, "lr": 3e-3}


def test_a_named_method_comes_with_its_own_defaults():
    config = build({**RUN, "method": "id3"})
    assert config == TrainConfig(**RUN, method="id3")
    assert (config.scope, config.lr, config.dense_lr) == (None, "auto", None)
    found = with_rates(config, unmask.select(mlp(), unmask.id3(5, 10)), total=1000)
    assert (found.lr, found.dense_lr) == (1e-3, None)


def test_every_front_door_has_the_same_recipe():
    """Compares the library's configuration, plain values, the presets of the command line, and the text "none"."""
    config = TrainConfig(**RUN)
    assert config == build(RUN) == build(under_preset(None, RUN)) == build({**RUN, "method": "none"})
    assert config == build(under_preset("recommended", RUN)) == TrainConfig(**RUN, **RECIPE)


def test_inside_a_lora_the_recipe_is_a_random_mask_over_all_of_it():
    for preset in (None, "recommended"):
        config = build(under_preset(preset, {**RUN, "into": "lora"}))
        assert config == TrainConfig(**RUN, into="lora", method="random_mask", lr="auto", dense_lr="auto")
    selection = unmask.select(mlp(), build({**RUN, "method": "random_mask", "budget": 1}).build_method(10))
    assert with_rates(config, selection, total=1_000).lr == pytest.approx(rate(1e-3, inside=True)) == 1e-2 < rate(1e-3)


@pytest.mark.parametrize("into", ["none", "lora"])
def test_on_word_problems_id3_stays_the_default(into):
    config = build(under_preset(None, {**RUN, "task": "gsm8k", "into": into}))
    assert (config.method, config.scope, config.lr, config.dense_lr) == ("id3", None, "auto", None)
    asked = build(under_preset("recommended", {**RUN, "task": "gsm8k", "into": into}))
    assert (asked.method, asked.lr) == ("random_mask", "auto")


def test_inside_other_added_modules_id3_stays_the_default():
    config = build(under_preset(None, {**RUN, "into": "dora"}))
    assert config == TrainConfig(**RUN, into="dora", method="id3")
    assert build(under_preset(None, {**RUN, "into": "none"})).method == RECIPE["method"]


def test_the_recipe_can_be_requested_with_another_method():
    config = build(under_preset("recommended", {**RUN, "method": "static_d3"}))
    assert (config.method, config.scope, config.lr) == ("static_d3", RECIPE["scope"], RECIPE["lr"])


def test_the_papers_preset_is_the_second_of_the_papers_runs():
    config = build(under_preset("paper", {**RUN, "epochs": "2"}))
    assert (config.method, config.exp, config.max_length, config.epochs, config.scope) == ("id3", 2, 256, 2, None)
    assert (config.lr, config.seed, config.warmup, config.eval_steps) == (3e-4, 7, 0, 100)
    full = build(under_preset("paper", {"model": "m", "output": "o", "task": "rte", "method": "full"}))
    assert (full.method, full.lr, full.seed, full.budget) == ("full", 7e-6, 7, None)
    math = build(under_preset("paper", {**RUN, "task": "math10k"}))
    assert (math.lr, math.seed, math.exp, math.batch_size, math.accumulation) == (3e-4, 42, 0, 4, 1)
    assert build(under_preset("paper", {**RUN, "lr": "1e-3", "seed": "5"})).lr == 1e-3


def test_the_papers_preset_knows_a_lora_and_repeat_s():
    config = build(under_preset("paper", {**RUN, "into": "lora", "method": "full", "budget": None}))
    assert (config.lora_r, config.lora_alpha, config.lora_targets, config.lr) == (8, 8, ("layer-linear",), 3e-4)
    assert build(under_preset("paper", {**RUN, "into": "none"})).lora_targets == ()
    assert build(under_preset("paper", {**RUN, "method": "repeat_d3"})).leaving == "kept"
    assert build(under_preset("tuned", {**RUN, "method": "repeat_d3"})).leaving == "restored"


def test_the_tuned_preset_has_this_projects_settings():
    config = build(under_preset("tuned", RUN))
    assert (config.method, config.lr, config.seed, config.warmup, config.epochs) == ("id3", 1e-3, 1, 0.06, 10)
    assert build(under_preset("tuned", {**RUN, "method": "random_mask"})).lr == 1e-2
    assert build(under_preset("tuned", {**RUN, "task": "gsm8k"})).accumulation == 4


def test_the_rate_falls_with_the_root_of_the_budgets_share():
    assert rate(0.002) == pytest.approx(1e-2)
    assert rate(0.008) == pytest.approx(rate(0.002) / 2)
    assert [rate(share) for share in (1e-4, 1e-9)] == [3e-2, 3e-2]
    assert [rate(share, inside=True) for share in (1e-4, 0.002, 0.008)] == [1e-2, 1e-2, rate(0.008)]
    assert build({**RUN, "lr": "auto"}).lr == "auto"
    with pytest.raises(ConfigError, match=r"lr = 0\.0; it must be above 0"):
        build({**RUN, "lr": 0})
    with pytest.raises(ConfigError, match=r"lr = 'fast' is no float, nor auto"):
        build({**RUN, "lr": "fast"})
    with pytest.raises(ConfigError, match="lr = 'none' is no float, nor auto"):
        build({**RUN, "lr": "none"})
    with pytest.raises(ConfigError, match="max_steps = 'auto' is no int"):
        build({**RUN, "max_steps": "auto"})
    with pytest.raises(ConfigError, match="max_steps = 'auto'; it must be int"):
        TrainConfig(**RUN, max_steps="auto")


def test_a_head_with_a_hidden_layer_has_a_lower_rate():
    config = build(under_preset(None, {**RUN, "budget": 5, "lr": "0.5"}))
    method = config.build_method(10)

    def rates(**more):
        found = with_rates(config, unmask.select(mlp(), method, **more), total=1000)
        return found.lr, found.dense_lr

    assert rates(dense="^4") == (0.5, 0.5), "one matrix and its bias"
    assert rates(dense="^[24]") == (0.5, 1e-3)
    assert rates() == (0.5, 0.5)
    assert head_rate(3e-4, 2) == 3e-4, "never above the mask's"
    named = build({**RUN, "method": "random_mask"})
    auto = with_rates(named, unmask.select(mlp(), method), total=1000)
    assert (auto.lr, auto.dense_lr) == (rate(0.005), None)


def test_under_method_full_dense_lr_depends_on_the_heads_matrices():
    config = build({**RUN, "method": "full", "budget": None, "lr": 0.5, "dense_lr": "auto"})
    selection = unmask.select(mlp(), unmask.full())
    assert with_rates(config, selection, 1000, {"4.weight", "4.bias"}).dense_lr == 0.5
    assert with_rates(config, selection, 1000, {"2.weight", "4.weight"}).dense_lr == 1e-3


def test_an_unknown_preset_and_a_task_without_one_are_refused():
    with pytest.raises(ConfigError, match="preset = 'ours'; there are recommended, paper and tuned"):
        under_preset("ours", RUN)
    for name in ("paper", "tuned"):
        with pytest.raises(ConfigError, match="task 'None'"):
            under_preset(name, {})


def test_the_recipe_is_a_random_mask_over_linear_weights():
    method = build(under_preset(None, {**RUN, "seed": 3})).build_method(100)
    assert method == unmask.random_mask("1%", seed=3).but(scope=unmask.Scope("linear"))
