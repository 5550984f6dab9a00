"""Tests the command line as a user types it, on a tiny model and toy data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run, train_words
from tiny import tiny_world
from transformers import AutoModelForSequenceClassification

import unmask
from unmask.lab.training.recipe import rate
from unmask.lab.training.settings import read_yaml

# These tests are not about the Trainer's own warnings.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    run(*train_words("run", "--set", "save_steps=8"), cwd=world)
    return world / "run"


def test_help_waits_for_no_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom unmask.cli.app import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "print(result.exit_code, 'train' in result.output, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "False"]


def test_methods_lists_every_preset(world: Path) -> None:
    printed = run("methods", cwd=world).stdout
    assert all(name in printed for name in unmask.PRESETS)


def test_libraries_that_no_one_asked_for_print_nothing(world: Path) -> None:
    """peft imports torchao and bitsandbytes where they are installed, and these warn of each GPU library that is not there."""
    words = train_words("quiet", "--max-steps", 1)
    line = [sys.executable, "-m", "unmask", *map(str, words)]
    done = subprocess.run(line, cwd=world, capture_output=True, text=True, check=True)
    assert "delta" in done.stdout
    assert not any(name in done.stdout + done.stderr for name in ("Failed to load", "torchao", "_pytree", "kernels"))


@pytest.mark.parametrize("name", unmask.PRESETS)
def test_train_makes_the_method_that_is_named(name: str, world: Path) -> None:
    """The delta's metadata, the summary and the configuration name the method."""
    more: list[object] = ["--method", name, "--max-steps", 1]
    if name == "sparse_adapter":
        more += ["--into", "lora", "--set", "criterion=random"]
    words = train_words(f"named-{name}", *more)
    if name == "full":
        at = words.index("--budget")
        words = (*words[:at], *words[at + 2 :])
    run(*words, cwd=world)
    folder = world / f"named-{name}"
    assert unmask.SparseDelta.load(folder / "delta.safetensors").metadata["method"]["name"] == name
    assert json.loads((folder / "summary.json").read_text())["method"]["name"] == name
    assert read_yaml(folder / "config.yaml")["method"] == name


def test_without_a_method_the_recipe_runs_and_the_config_says_so(world: Path) -> None:
    words = [word for word in train_words("recipe", "--max-steps", 2) if word not in ("--method", "id3")]
    run(*words, cwd=world)
    config = read_yaml(world / "recipe" / "config.yaml")
    assert (config["method"], config["scope"]) == ("random_mask", "linear")
    assert config["lr"] == 0.05, "the command names a rate"
    at = words.index("--lr")
    run(*words[:at], *words[at + 2 :], "--overwrite", cwd=world)
    settings, summary = (read_yaml(world / "recipe" / name) for name in ("config.yaml", "summary.json"))
    assert settings["lr"] == settings["dense_lr"] == summary["lr"] == rate(120 / summary["parameters"])
    delta = unmask.SparseDelta.load(world / "recipe" / "delta.safetensors")
    assert sum(entry.indices.numel() for entry in delta.sparse.values()) == 120
    assert not any("embedding" in name.lower() or name.endswith("bias") for name in delta.sparse)


def test_train_writes_delta_config_metrics_and_summary(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["used"] == summary["budget"] == 120
    assert summary["steps"] == 24
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.1
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 24
    assert rows[-1]["used"] == 120
    delta = unmask.SparseDelta.load(trained / "delta.safetensors")
    assert len(delta) == 120
    assert set(delta.whole) == {"classifier.weight", "classifier.bias"}
    assert delta.metadata["base_id"] == "base"


def test_the_written_config_repeats_the_run_bit_for_bit(trained: Path, world: Path) -> None:
    run("train", "--config", "run/config.yaml", "--set", "output=again", cwd=world)
    first, again = (unmask.SparseDelta.load(world / f / "delta.safetensors") for f in ("run", "again"))
    assert first.sparse.keys() == again.sparse.keys()
    for name, entry in first.sparse.items():
        assert torch.equal(entry.values, again.sparse[name].values)
        assert torch.equal(entry.indices, again.sparse[name].indices)


def test_eval_prints_the_metrics_of_training(trained: Path, world: Path) -> None:
    words = ("eval", "base", "run/delta.safetensors", "--data", "dev.csv", "--text", "review", "--label", "verdict")
    printed = run(*words, cwd=world).stdout
    after = json.loads((trained / "summary.json").read_text())["after"]
    assert f"eval (32): accuracy {after['accuracy']:.4f}, f1 {after['f1']:.4f}" in printed


def test_apply_writes_the_model_of_base_plus_delta(trained: Path, world: Path) -> None:
    run("apply", "base", "run/delta.safetensors", "--output", "merged", cwd=world)
    merged = AutoModelForSequenceClassification.from_pretrained(world / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=2)
    unmask.SparseDelta.load(trained / "delta.safetensors").apply(base)
    for (name, p), q in zip(merged.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(p, q), name
    refused = run("apply", "base", "run/delta.safetensors", "--output", "merged", cwd=world, check=False)
    assert refused.returncode == 1
    assert "not empty" in refused.stderr


def test_a_head_that_the_checkpoint_lacks_is_in_the_delta_without_being_named(world: Path) -> None:
    """Uses the library alone. The head is in the budget's scope, and its random init is in no checkpoint."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=2).eval())
    tuned, fresh = models
    selection = unmask.select(tuned, unmask.random_mask(50))
    delta = selection.delta()
    selection.release()
    assert set(delta.whole) == {"classifier.weight", "classifier.bias"}
    delta.apply(fresh)
    for (name, p), q in zip(tuned.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_counts_of_inspect_add_up(trained: Path, world: Path) -> None:
    facts = json.loads(run("inspect", "run/delta.safetensors", "--json", cwd=world).stdout)
    assert facts["weights"] == 120
    for view in ("layers", "kinds", "tensors"):
        assert sum(row["changed"] for row in facts[view].values()) == 120
    assert facts["bytes"] == (trained / "delta.safetensors").stat().st_size
    assert "by module kind" in run("inspect", "run/delta.safetensors", cwd=world).stdout


def test_bias_correction_entry_is_recorded_and_another_one_is_refused_on_resume(trained: Path, world: Path) -> None:
    run(*train_words("entry", "--set", "save_steps=9", "--set", "bias_correction=entry"), cwd=world)
    folder = world / "entry"
    assert "bias_correction: entry" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "summary.json").read_text())["bias_correction"] == "entry"
    assert json.loads((trained / "summary.json").read_text())["bias_correction"] == "global"
    saved = torch.load(folder / "checkpoints" / "checkpoint-18" / "optimizer.pt", weights_only=True)
    assert saved["state"][0]["age"].tolist() == [18 - i // 5 if i < 90 else 0 for i in range(120)]  # 5 a step
    whole = unmask.SparseDelta.load(folder / "delta.safetensors")
    plain = unmask.SparseDelta.load(trained / "delta.safetensors")
    assert not torch.equal(whole.whole["classifier.weight"], plain.whole["classifier.weight"])
    (folder / "delta.safetensors").unlink()
    refused = run(
        "train", "--config", "entry/config.yaml", "--set", "bias_correction=global", "--resume", cwd=world, check=False
    )
    assert refused.returncode == 1
    assert "\n  bias_correction: entry -> global\n" in refused.stderr


def test_another_rate_for_the_head_is_printed(world: Path) -> None:
    printed = run(*train_words("head", "--max-steps", 2, "--set", "dense_lr=0.01"), cwd=world).stdout
    assert "(dense 0.01)" in " ".join(printed.split())


def test_the_size_of_checkpoints_depends_on_the_budget(trained: Path) -> None:
    (checkpoint,) = sorted((trained / "checkpoints").glob("checkpoint-24"))
    state = (checkpoint / "selection.safetensors").stat().st_size
    assert state < 120 * (4 + 4 + 8) + 12_000  # values, base, positions; names, shapes and the small head
    assert not (checkpoint / "model.safetensors").exists()


REFUSED = {
    "no such task": (("--task", "wnli"), "unknown task 'wnli'; there are cola"),
    "task and data": (("--task", "rte"), "not both"),
    "no such method": (("--method", "lora"), "--method 'lora'"),
    "no such column": (("--text", "body"), "no column 'body'; its columns are review, verdict"),
    "no such file": (("--data", "nowhere.csv"), "there is no file 'nowhere.csv'"),
    "no such model": (("--model", "./nowhere"), "there is no model folder './nowhere'"),
    "budget 0": (("--budget", "0"), "--budget 0"),
    "negative budget": (("--budget", "-5"), "--budget -5"),
    "budget above N": (("--budget", "99999999"), "only"),
    "budget of full": (("--method", "full"), "method 'full' trains every weight"),
    "budget as text": (("--budget", "many"), "--budget 'many'"),
    "unknown setting": (("--set", "lerning_rate=1"), "unknown setting 'lerning_rate'"),
    "not a number": (("--set", "lr=fast"), "--lr 'fast'"),
    "no such correction": (
        ("--set", "bias_correction=slot"),
        "bias_correction = 'slot'; it must be one of global, entry",
    ),
    "nothing to resume": (("--resume",), "no checkpoint"),
    "a pattern that finds nothing": (("--set", "include=qurey"), "'qurey' is found in no parameter name"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_gives_one_clear_message(what: str, world: Path) -> None:
    words, message = REFUSED[what]
    done = run(*train_words("refused"), *words, cwd=world, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_long_texts_are_cut_at_the_positions_of_the_model(world: Path) -> None:
    long = world / "long.csv"
    long.write_text("review,verdict\n" + "\n".join(f"{'film ' * 60}{w},{v}" for w, v in (("fine", 1), ("dull", 0)) * 4))
    words = ("--data", "long.csv", "--eval", "long.csv", "--set", "max_steps=1", "--set", "max_length=64")
    assert "cut at the 32 tokens" in run(*train_words("long"), *words, cwd=world).stdout
    assert unmask.SparseDelta.load(world / "long" / "delta.safetensors").metadata["task"]["max_length"] == 32


def test_a_run_is_not_overwritten(trained: Path, world: Path) -> None:
    before = (trained / "delta.safetensors").read_bytes()
    done = run(*train_words("run"), cwd=world, check=False)
    assert done.returncode == 1
    assert "already holds a run" in done.stderr
    assert (trained / "delta.safetensors").read_bytes() == before


def test_a_diverging_run_stops_with_a_message(world: Path) -> None:
    """The weights overflow at once. No delta of NaN is written, and the message says what happened."""
    done = run(*train_words("nan"), "--lr", "1e38", "--set", "max_grad_norm=0", cwd=world, check=False)
    assert done.returncode == 1
    assert "not finite" in done.stderr or "NaN" in done.stderr
    assert not (world / "nan" / "delta.safetensors").exists()


def test_a_damaged_delta_is_refused(trained: Path, world: Path) -> None:
    damaged = bytearray((trained / "delta.safetensors").read_bytes())
    damaged[-3] ^= 1
    (world / "damaged.safetensors").write_bytes(damaged)
    (world / "cut.safetensors").write_bytes(damaged[: len(damaged) // 2])
    for file in ("damaged.safetensors", "cut.safetensors", "nowhere.safetensors"):
        done = run("inspect", file, cwd=world, check=False)
        assert done.returncode == 1
        assert file in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", ["repeat_d3", "static_d3", "pafi", "fish", "bitfit", "random_mask", "full"])
def test_every_method_runs_from_the_command_line(method: str, world: Path) -> None:
    words = ("--method", method, "--set", "max_steps=3", "--set", "num_samples=16", "--bf16")
    words += ("--set", "budget=none") if method == "full" else ()
    run(*train_words(f"run-{method}"), *words, cwd=world)
    summary = json.loads((world / f"run-{method}" / "summary.json").read_text())
    assert summary["used"] == summary["budget"]
    assert summary["steps"] == 3


def test_checkpointing_and_accumulation_do_not_change_the_run(world: Path) -> None:
    """The run with recomputed activations is the same. Micro-batches of 4 select as many weights as one batch of 16."""
    steps = ("--set", "max_steps=4")
    run(*train_words("plain"), *steps, cwd=world)
    run(*train_words("recomputed"), *steps, "--set", "gradient_checkpointing=true", cwd=world)
    run(*train_words("micro"), *steps, "--batch-size", 4, "--set", "accumulation=4", cwd=world)
    plain, recomputed, micro = (
        unmask.SparseDelta.load(world / f / "delta.safetensors") for f in ("plain", "recomputed", "micro")
    )
    assert len(plain) == len(recomputed) == len(micro) == 120
    assert plain.sparse.keys() == recomputed.sparse.keys()
    for name, entry in plain.sparse.items():
        assert torch.equal(entry.indices, recomputed.sparse[name].indices)
        assert torch.equal(entry.values, recomputed.sparse[name].values)
