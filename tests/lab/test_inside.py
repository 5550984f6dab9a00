"""Tests `unmask train --into lora`, from a base on disk to predictions in a fresh process and to an ordinary LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run, train_words
from inside_runs import DATA, assert_seeds_give_the_same_model, delta_of, outputs
from tiny import tiny_world
from transformers import AutoModelForSequenceClassification

import unmask
from peft import AutoPeftModelForSequenceClassification, PeftModel
from unmask.errors import ConfigError
from unmask.lab.inside import Into, _has_adapters, into_of
from unmask.lab.models import load_tuned
from unmask.lab.training.recipe import rate
from unmask.lab.training.settings import build, read_yaml

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

KINDS = {
    "lora": ("--into", "lora", "--lora-r", 4, "--lora-alpha", 8),
    "dora": ("--into", "dora", "--lora-r", 4, "--set", "lora_targets=all-linear"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_world(tmp_path_factory.mktemp("into"))
    for kind, words in KINDS.items():
        run(*train_words(kind, "--set", "save_steps=8"), *words, cwd=root)
    return root


def from_run(world: Path, kind: str) -> torch.nn.Module:
    return load_tuned(str(world / "base"), delta_of(world / kind))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_lies_inside_and_the_head_outside_it(kind: str, world: Path) -> None:
    delta = delta_of(world / kind)
    summary = json.loads((world / kind / "summary.json").read_text())
    assert len(delta) == summary["used"] == 120
    assert all("lora_" in name for name in delta.sparse)
    assert summary["dense"] == 34
    assert summary["into"]["kind"] == kind
    assert summary["after"]["loss"] < summary["before"]["loss"]


def test_without_a_method_a_random_mask_lies_in_the_lora(world: Path) -> None:
    words = [word for word in train_words("recipe", "--max-steps", 2) if word not in ("--method", "id3")]
    at = words.index("--lr")
    run(*words[:at], *words[at + 2 :], *KINDS["lora"], cwd=world)
    settings = read_yaml(world / "recipe" / "config.yaml")
    summary = json.loads((world / "recipe" / "summary.json").read_text())
    assert (settings["method"], settings["scope"]) == ("random_mask", None)
    assert settings["lr"] == settings["dense_lr"] == rate(120 / summary["parameters"], inside=True)
    assert sum("lora_" in name for name in delta_of(world / "recipe").sparse) > 0
    assert len(delta_of(world / "recipe")) == 120


@pytest.mark.parametrize("kind", KINDS)
def test_eval_in_a_fresh_model_gives_the_figure_of_training(kind: str, world: Path) -> None:
    printed = run("eval", "base", f"{kind}/delta.safetensors", *DATA, cwd=world).stdout
    after = json.loads((world / kind / "summary.json").read_text())["after"]
    assert f"accuracy {after['accuracy']:.4f}" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_of_head_and_lora_gives_the_same_outputs_bit_for_bit(kind: str, world: Path) -> None:
    assert torch.equal(assert_seeds_give_the_same_model(world, kind), outputs(from_run(world, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_apply_writes_an_ordinary_lora(kind: str, world: Path) -> None:
    run("apply", "base", f"{kind}/delta.safetensors", "--output", f"{kind}-adapter", "--adapter", cwd=world)
    base = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=2)
    ordinary = PeftModel.from_pretrained(base, world / f"{kind}-adapter")
    assert torch.equal(outputs(ordinary), outputs(from_run(world, kind)))


def test_the_ordinary_lora_names_its_base(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("apply", "base", "lora/delta.safetensors", "--output", "auto", "--adapter", cwd=world)
    monkeypatch.chdir(world)
    model = AutoPeftModelForSequenceClassification.from_pretrained("auto", num_labels=2)
    assert torch.equal(outputs(model), outputs(from_run(world, "lora")))


@pytest.mark.parametrize("kind", KINDS)
def test_apply_merges_up_to_rounding(kind: str, world: Path) -> None:
    run("apply", "base", f"{kind}/delta.safetensors", "--output", f"{kind}-merged", cwd=world)
    merged = AutoModelForSequenceClassification.from_pretrained(world / f"{kind}-merged")
    torch.testing.assert_close(outputs(merged), outputs(from_run(world, kind)), rtol=1e-4, atol=1e-5)


def test_inspect_names_the_modules_that_the_delta_is_inside_of(world: Path) -> None:
    printed = run("inspect", "lora/delta.safetensors", cwd=world).stdout
    assert "inside lora (alpha 8.0, dropout 0.0, r 4" in printed
    facts = json.loads(run("inspect", "lora/delta.safetensors", "--json", cwd=world).stdout)
    assert facts["weights"] == 120
    assert set(facts["initial"]) == set(facts["tensors"])


@pytest.mark.parametrize("rest", ["zero", "kept"])
def test_sparse_adapter_runs_from_the_command_line(rest: str, world: Path) -> None:
    words = ("--into", "lora", "--method", "sparse_adapter", "--set", "criterion=random", "--set", f"pruned={rest}")
    run(*train_words(f"pruned-{rest}"), *words, "--set", "max_steps=3", cwd=world)
    delta = delta_of(world / f"pruned-{rest}")
    assert len(delta) == 120
    model = from_run(world, f"pruned-{rest}")
    inside = {name: p for name, p in model.named_parameters() if "lora_A" in name}
    zeros = sum(int((p == 0).sum()) for p in inside.values())
    kept = sum(delta.sparse[name].numel for name in inside if name in delta.sparse)
    assert zeros == (sum(p.numel() for p in inside.values()) - kept if rest == "zero" else 0)


# ---------------------------------------------------------------- refusals


@pytest.mark.skipif(_has_adapters(), reason="adapters is installed")
def test_bottleneck_adapters_without_their_library_say_which_extra(world: Path) -> None:
    done = run(*train_words("refused"), "--into", "pfeiffer", cwd=world, check=False)
    assert done.returncode == 1
    assert "pip install 'unmask[adapters]'" in done.stderr
    assert "cannot share one with transformers 5" in done.stderr
    assert not (world / "refused").exists()


def test_a_module_that_is_not_there_is_refused(world: Path) -> None:
    words = ("--into", "lora", "--set", "lora_targets=q_proj")
    done = run(*train_words("refused"), *words, cwd=world, check=False)
    assert done.returncode == 1
    assert "lora cannot be added to this BertForSequenceClassification" in done.stderr


def test_an_adapter_folder_of_a_run_on_the_base_itself_is_refused(world: Path) -> None:
    run(*train_words("plain"), "--set", "max_steps=1", cwd=world)
    done = run("apply", "base", "plain/delta.safetensors", "--output", "nowhere", "--adapter", cwd=world, check=False)
    assert done.returncode == 1
    assert "leave --adapter out" in done.stderr


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"into": "prefix"}, "into ="),
        ({"into": "lora", "lora_r": 0}, "lora_r ="),
        ({"into": "lora", "lora_dropout": 1.0}, "lora_dropout ="),
        ({"into": "pfeiffer", "reduction_factor": -1}, "reduction_factor ="),
        ({"method": "sparse_adapter"}, "give into"),
        ({"into": "lora", "criterion": "wanda"}, "criterion ="),
        ({"into": "lora", "pruned": "half"}, "pruned ="),
    ],
)
def test_a_setting_that_cannot_work_is_refused(setting: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build({"model": "m", "output": "o", "task": "sst2", "budget": "10"} | setting)


def test_a_delta_inside_something_unknown_is_refused() -> None:
    delta = unmask.SparseDelta({}, {}, "sha256:0", {"into": {"kind": "prefix"}})
    with pytest.raises(unmask.DeltaError, match="this unmask can add lora, dora"):
        into_of(delta)
    for into in (Into("dora", 4, targets=("query",)), Into("houlsby", reduction=4.0)):
        assert into_of(delta.with_metadata(into=into.describe())) == into
