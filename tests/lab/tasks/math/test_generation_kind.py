"""Tests `unmask train` and `unmask eval` on word problems with a tiny model that can learn a little."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commands import run
from tiny_llama import addition, byte_tokenizer, llama, math_folder, save_llama

from unmask.cli.evaluate import run_eval
from unmask.delta.delta import SparseDelta
from unmask.errors import ConfigError
from unmask.lab.tasks.math.problems import Problem, load_problems
from unmask.lab.tasks.math.prompts import Completions, PadRight, Prompter
from unmask.lab.tasks.math.run import token_accuracy
from unmask.lab.tasks.protocol import Request, Source
from unmask.lab.tasks.registry import kind_for
from unmask.lab.training.settings import build

TRAIN = (
    "train", "--model", "base", "--method", "id3", "--data-dir", "math", "--max-steps", 40, "--batch-size", 8, "--lr", 0.01,
    "--set", "max_new_tokens=24", "--set", "test_limit=6", "--set", "held_out=4", "--set", "logging_steps=10",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base and problems that all have one answer, which a tiny model can learn to write."""
    root = tmp_path_factory.mktemp("world")
    save_llama(root / "base")
    math_folder(root / "math", answer=7)
    return root


@pytest.fixture(scope="module")
def full(world):
    words = ("--task", "gsm8k", "--method", "full", "--set", "test_sets=svamp,multiarith", "--output", "full")
    return run(*TRAIN, *words, cwd=world).stdout


def test_training_teaches_the_solutions(world, full):
    summary = json.loads((world / "full" / "summary.json").read_text())
    assert summary["after"]["loss"] < 0.5 < summary["before"]["loss"]
    assert summary["after"]["token_accuracy"] > 0.9 > 0.2 > summary["before"]["token_accuracy"]
    sets = [summary["after"][f"{name}_accuracy"] for name in ("svamp", "multiarith")]
    assert summary["after"]["accuracy"] == summary["main"] == sum(sets) / 2
    assert (summary["task"], summary["main_metric"]) == ("gsm8k", "accuracy")
    assert "4 of 40 problems are held out" in full.replace("\n", " ")
    rows = [json.loads(line) for line in (world / "full" / "metrics.jsonl").read_text().splitlines()]
    assert {"eval_loss", "eval_token_accuracy"} <= set(rows[0])


def test_base_plus_delta_generates_what_the_run_generated(world, full):
    words = ("--task", "svamp,multiarith", "--data-dir", "math", "--limit", 6, "--batch-size", 16)
    printed = run("eval", "base", "full/delta.safetensors", *words, "--output", "again", cwd=world).stdout
    after = json.loads((world / "full" / "summary.json").read_text())["after"]
    assert f"svamp (6): accuracy {after['svamp_accuracy']:.4f}, unanswered {after['svamp_unanswered']:.4f}" in printed
    assert f"mean of the sets (12): accuracy {after['accuracy']:.4f}" in printed
    for name in ("svamp", "multiarith"):
        assert (world / "again" / f"{name}.jsonl").read_text() == (
            world / "full" / "solved" / f"{name}.jsonl"
        ).read_text()


def test_the_base_alone_can_be_evaluated(world):
    words = ("--task", "svamp", "--data-dir", "math", "--limit", 3, "--set", "max_new_tokens=8")
    assert "svamp (3): accuracy 0.0000" in run("eval", "base", *words, cwd=world).stdout
    assert (world / "runs" / "solved" / "base" / "svamp.jsonl").is_file()


def test_a_budget_inside_a_lora(world):
    words = ("--task", "math10k", "--into", "lora", "--budget", 300, "--set", "test_sets=svamp", "--output", "lora")
    run(*TRAIN, *words, cwd=world)
    described = json.loads((world / "lora" / "summary.json").read_text())
    assert described["used"] == 300
    assert described["into"]["kind"] == "lora"
    words = ("--task", "svamp", "--data-dir", "math", "--limit", 6, "--batch-size", 16, "--output", "lora-again")
    run("eval", "base", "lora/delta.safetensors", *words, cwd=world)
    again, first = (world / folder / "svamp.jsonl" for folder in ("lora-again", "lora/solved"))
    assert again.read_text() == first.read_text()
    run("apply", "base", "lora/delta.safetensors", "--adapter", "--output", "adapter", cwd=world)
    assert json.loads((world / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_without_test_sets_runs_are_compared_by_the_loss(world):
    run(*TRAIN, "--task", "math10k", "--budget", "1%", "--max-steps", 4, "--output", "plain", cwd=world)
    summary = json.loads((world / "plain" / "summary.json").read_text())
    assert (summary["main_metric"], summary["greater_is_better"]) == ("loss", False)
    assert summary["main"] == summary["after"]["loss"]
    assert not (world / "plain" / "solved").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "base", "--task", "sst2"), "which has no trained head"),
        (("eval", "base"), "give the data to evaluate on"),
        (("eval", "base", "--task", "gsm8k,sst2"), "test sets sst2: they must be of"),
        (
            ("eval", "base", "--task", "gsm8k", "--set", "beams=3"),
            "unknown setting 'beams'; word problems have prompt, rule",
        ),
        (("eval", "base", "--task", "gsm8k", "--set", "max_new_tokens=x"), "max_new_tokens = 'x' must be of type int"),
        (("eval", "base", "--task", "gsm8k", "--data", "a.csv"), "give --task with some of gsm8k"),
        (
            (*TRAIN, "--task", "svamp", "--budget", "1%", "--output", "x"),
            "svamp has no train split; gsm8k, math10k have",
        ),
        ((*TRAIN, "--task", "gsm8k", "--budget", "1%", "--output", "x", "--set", "test_sets=aqua"), "no AQuA/test"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(world, words, message):
    done = run(*words, cwd=world, check=False)
    assert done.returncode == 1
    assert message in done.stderr


def test_options_of_word_problems_are_refused_for_other_tasks(tmp_path):
    described = {"kind": "sequence", "name": "sst2", "text_columns": ["sentence"], "num_labels": 2, "max_length": 64}
    path = SparseDelta({}, {}, "sha256:0", {"task": described}).save(tmp_path / "delta.safetensors")
    with pytest.raises(ConfigError, match=r"--limit, --set: for word problems only; 'sst2' has no use for it"):
        run_eval("base", path, Request("sst2", limit=3, options={"rule": "last"}), 1)


def test_word_problems_may_be_longer_than_sentences():
    given = {"model": "m", "output": "o", "budget": "1%"}
    assert build(given | {"task": "gsm8k"}).max_length == 512
    assert build(given | {"task": "gsm8k", "max_length": 99}).max_length == 99
    assert build(given | {"task": "sst2"}).max_length == 128
    with pytest.raises(ConfigError, match="max_new_tokens = 0"):
        build(given | {"task": "gsm8k", "max_new_tokens": 0})


def test_test_questions_in_the_training_data_are_noted(world, tmp_path):
    folder = math_folder(tmp_path / "math")
    (folder / "SVAMP" / "test.json").write_text((folder / "math_10k.json").read_text(), encoding="utf-8")
    config = build({"model": "m", "output": "o", "task": "math10k", "budget": "1%", "data_dir": str(folder)})
    source = Source.of(config)
    prepared = kind_for(config.task).load(source).prepare(llama(), byte_tokenizer(), source)
    assert any("40 of 40 questions of svamp are in the training data" in note for note in prepared.notes)


def test_token_accuracy_counts_the_completions_tokens_only(world):
    """The accuracy equals that of a loop over single tokens."""
    tokenizer, model = byte_tokenizer(), llama()
    problems = load_problems("gsm8k", "train", world / "math")[:3]
    batch = PadRight(0)([Completions(problems, Prompter(tokenizer), 512)[i] for i in range(3)])
    with torch.no_grad():
        guesses = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    hits = [
        int(guesses[row, at - 1] == batch["input_ids"][row, at])
        for row in range(3)
        for at in range(1, batch["labels"].shape[1])
        if batch["labels"][row, at] != -100
    ]
    assert len(hits) == sum(len(Prompter(tokenizer).completion_ids(p.solution)) for p in problems)
    assert token_accuracy(guesses.numpy(), batch["labels"].numpy()) == pytest.approx(np.mean(hits))


def test_the_loss_is_that_of_the_completion():
    """The loss is the mean negative log-likelihood of the completion's tokens, computed by hand."""
    tokenizer, model = byte_tokenizer(), llama(torch.float64)
    rows = [Problem(row["instruction"], "", row["output"], row["answer"], "number") for row in addition(2)]
    prompter = Prompter(tokenizer)
    batch = PadRight(0)([Completions(rows, prompter, 512)[i] for i in range(2)])
    loss = model(**batch).loss
    likelihoods = []
    for problem in rows:
        prompt, completion = prompter.prompt_ids(problem), prompter.completion_ids(problem.solution)
        scores = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        likelihoods += [scores[len(prompt) - 1 + at, token] for at, token in enumerate(completion)]
    assert loss.item() == pytest.approx(-torch.stack(likelihoods).mean().item(), rel=1e-5)
