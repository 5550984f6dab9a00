"""Tests `unmask eval` and `unmask apply` as a user takes a trained model further: other data, a checkpoint, a pipeline."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from commands import run, train_words
from tiny import BAD, FILLER, GOOD, tiny_world, toy_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from unmask import SparseDelta
from unmask.lab.tasks.protocol import Request
from unmask.lab.tasks.registry import kind_of
from unmask.lab.tasks.text.glue import load_glue

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
EVAL = ("eval", "base", "run/delta.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on semicolons with class names, its merged checkpoint, and a task of GLUE with other names."""
    root = tiny_world(tmp_path_factory.mktemp("world"))
    for name, count, seed in (("own.csv", 64, 0), ("held.csv", 32, 1)):
        with (root / name).open("w", newline="", encoding="cp1252") as file:
            csv.writer(file, delimiter=";").writerows([("review", "verdict"), *toy_rows(count, seed)])
    words = train_words("run", "--data", "own.csv", "--eval", "held.csv", "--encoding", "cp1252")
    run(*words, cwd=root)
    run("apply", "base", "run/delta.safetensors", "--output", "merged", cwd=root)
    (root / "glue" / "SST-2").mkdir(parents=True)
    rows = "".join(f"{text}\t{int(label == 'good')}\n" for text, label in toy_rows(8, 2))
    (root / "glue" / "SST-2" / "dev.tsv").write_text(f"sentence\tlabel\n{rows}")
    return root


def after(world: Path) -> str:
    metrics = json.loads((world / "run" / "summary.json").read_text())["after"]
    return f"eval (32): accuracy {metrics['accuracy']:.4f}, f1 {metrics['f1']:.4f}"


def test_a_file_is_read_as_the_one_that_was_trained_on(world):
    assert after(world) in run(*EVAL, "--data", "held.csv", cwd=world).stdout
    other = toy_rows(32, 1)
    with (world / "other.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("body", "kind"), *other, ("no kind", "")])
    words = ("--data", "other.csv", "--text", "body", "--label", "kind", "--delimiter", ",", "--encoding", "utf-8")
    assert "--drop-missing" in run(*EVAL, *words, cwd=world, check=False).stderr
    printed = run(*EVAL, *words, "--drop-missing", cwd=world).stdout
    assert "1 row without a text or a label is left out" in printed
    assert after(world) in printed


def test_a_merged_checkpoint_is_scored_by_its_own_head(world):
    words = ("eval", "merged", "--data", "held.csv", "--encoding", "cp1252", "--text", "review", "--label", "verdict")
    assert after(world) in run(*words, cwd=world).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*EVAL, "--task", "sst2", "--data-dir", "glue"), r"negative, positive.*bad, good.*would mean nothing"),
        (("eval", "merged", "--task", "sst2", "--data-dir", "glue"), r"negative, positive.*bad, good"),
        (EVAL, "texts of your own; give --data"),
        (("eval", "merged"), "give the data to evaluate on"),
        (("eval", "base", "--data", "held.csv"), r"is a BertModel, which has no trained head"),
        (("eval", "nowhere", "--data", "held.csv"), "cannot be loaded"),
        ((*EVAL, "--data", "held.csv", "--limit", "3"), "--limit: for word problems only"),
    ],
    ids=str,
)
def test_what_would_mean_nothing_is_refused(words, message, world):
    done = run(*words, cwd=world, check=False)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr


def test_a_task_with_the_same_labels_is_scored_with_a_note(tmp_path):
    for folder, columns in (("RTE", "sentence1\tsentence2"), ("QNLI", "question\tsentence")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dev.tsv").write_text(f"index\t{columns}\tlabel\n0\ta\tb\tentailment\n")
    spec = load_glue("rte", tmp_path, need_train=False).spec
    described = {"kind": "sequence", "name": "rte", "num_labels": 2, "label_names": list(spec.label_names or ())}
    described |= {"text_columns": ["sentence1", "sentence2"], "max_length": 8}
    same = kind_of(described).reload(described, Request("rte", str(tmp_path)))
    other = kind_of(described).reload(described, Request("qnli", str(tmp_path)))
    transfer = "the head was trained on 'rte' and is scored on 'qnli'"
    assert [any(transfer in note for note in task.notes) for task in (same, other)] == [False, True]


def test_a_pipeline_names_the_classes_of_a_merged_checkpoint(world):
    classify = pipeline("text-classification", model=str(world / "merged"))
    delta = SparseDelta.load(world / "run" / "delta.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=2)
    delta.apply(model)
    inputs = AutoTokenizer.from_pretrained(world / "base")(f"{GOOD[0]} film", return_tensors="pt")
    scores = model.eval()(**inputs).logits.softmax(-1)[0]
    found = classify(f"{GOOD[0]} film")[0]
    assert found["label"] == ("bad", "good")[int(scores.argmax())]
    assert found["score"] == pytest.approx(float(scores.max()), abs=1e-6)


def test_a_pipeline_gives_a_regressions_own_number(world):
    """1 to 5 stars are whole numbers. The pipeline must not squash them by a sigmoid."""
    rows = [(text, 5 if label == "good" else 1 + (i % 2)) for i, (text, label) in enumerate(toy_rows(64, 3))]
    with (world / "stars.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("review", "stars"), *rows])
    words = train_words("stars", "--data", "stars.csv", "--eval", "stars.csv", "--label", "stars")
    refused = run(*words, cwd=world, check=False)
    assert "--num-labels 1" in refused.stderr
    run(*words, "--num-labels", 1, cwd=world)
    run("apply", "base", "stars/delta.safetensors", "--output", "rated", cwd=world)
    model = AutoModelForSequenceClassification.from_pretrained(world / "rated").eval()
    inputs = AutoTokenizer.from_pretrained(world / "rated")(f"{BAD[0]} plot", return_tensors="pt")
    rate = pipeline("text-classification", model=str(world / "rated"))
    with torch.no_grad():
        assert rate(f"{BAD[0]} plot")[0]["score"] == pytest.approx(float(model(**inputs).logits), abs=1e-5)
    assert (
        "pearson"
        in run("eval", "rated", "--data", "stars.csv", "--text", "review", "--label", "stars", cwd=world).stdout
    )


def test_a_pipeline_names_the_tags_of_a_merged_checkpoint(world):
    lines = [f"{FILLER[0]} O\n{GOOD[i % 4]} B-PER\n{FILLER[1]} O\n" for i in range(12)]
    (world / "tags.conll").write_text("\n".join(lines))
    words = [
        "train",
        "--model",
        "base",
        "--task",
        "ner",
        "--data",
        "tags.conll",
        "--eval",
        "tags.conll",
        "--budget",
        120,
    ]
    run(*words, "--max-steps", 12, "--lr", 0.05, "--output", "tags", cwd=world)
    run("apply", "base", "tags/delta.safetensors", "--output", "tagger", cwd=world)
    tag = pipeline("token-classification", model=str(world / "tagger"), ignore_labels=[])
    assert {found["entity"] for found in tag(f"{FILLER[0]} {GOOD[0]}")} <= {"O", "B-PER", "I-PER"}
    assert "eval (12)" in run("eval", "tagger", "--task", "ner", "--data", "tags.conll", cwd=world).stdout
