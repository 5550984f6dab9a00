"""Tests tagging of words: pieces, windows, and whole runs on a tiny model that spells words letter by letter."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from commands import run
from helpers import assert_same_tensors
from letters import letters_tokenizer, tagger_words, tagger_world, toy
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizerFast,
)

import unmask
from unmask.errors import ConfigError
from unmask.lab.models import load_base
from unmask.lab.tasks import Sentences, TagSpec
from unmask.lab.tasks.tags.spans import score
from unmask.lab.tasks.tags.windows import IGNORED, Windows, cut

# The Trainer's own warnings are not tested here.
pytestmark = pytest.mark.filterwarnings("default")
SPEC = TagSpec("ner", ("LOC", "PER"))
METRICS = ("f1", "precision", "recall", "accuracy", "loss")


# ---------------------------------------------------------------- pieces and windows


def test_the_label_stands_on_the_first_piece_and_the_rest_is_ignored() -> None:
    sentence = Sentences([["pab", "q", "in", "l"]], [["B-PER", "I-PER", "O", "B-LOC"]])
    (item,) = Windows(sentence, letters_tokenizer(), SPEC.label_names, 32, training=True)
    no = IGNORED
    assert item["labels"] == [no, 3, no, no, 4, 0, no, 1, no]  # [CLS] p ##a ##b q i ##n l [SEP]
    assert len(item["input_ids"]) == len(item["attention_mask"]) == 9


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("length", [4, 7, 12, 40])
def test_windows_lose_no_word_and_no_tag(length: int, training: bool) -> None:
    """The labels of the windows, put together, are the sentences' tags. No window is longer than allowed."""
    sentences = toy(60, seed=1, longest=12)
    for odd in (["x" * 50, "pa", "y" * 50], ["\u200d", "p\ufe0f", "\ufe0f", "l"], ["a.b-c", "l'x"]):
        sentences.words.append(odd)
        sentences.tags.append(["B-PER", "I-PER", "O", "B-LOC"][: len(odd)])
    windows = Windows(sentences, letters_tokenizer(), SPEC.label_names, length, training)
    items = [windows[i] for i in range(len(windows))]
    assert max(len(item["input_ids"]) for item in items) <= length
    assert windows.tags_of(item["labels"] for item in items) == sentences.tags
    found = [label for item in items for label in item["labels"] if label != IGNORED]
    assert len(found) == sum(map(len, sentences.words))
    assert len(windows) > len(sentences)


def test_predictions_of_windows_are_put_together_before_they_are_scored() -> None:
    """The entity that lies across the cut is found whole, because both windows predict their part of it."""
    sentence = Sentences([["pxyz", "qxyz", "qxyz", "a"]], [["B-PER", "I-PER", "I-PER", "O"]])
    windows = Windows(sentence, letters_tokenizer(), SPEC.label_names, 10, training=False)
    assert [(w.start, w.stop) for w in windows.windows] == [(0, 2), (2, 4)]
    note = windows.note("dev")
    assert note is not None
    assert "1 of 1 sentences" in note
    assert "into 2 parts, no word left out; 1 entities lie across a cut" in note
    right = windows.tags_of([windows[i]["labels"] + [IGNORED] * 3 for i in range(2)])  # The Trainer pads predictions.
    assert score(sentence.tags, right)["f1"] == 1.0


def test_training_cuts_outside_entities_and_evaluation_does_not_look_at_the_tags() -> None:
    words = ["axy", "bxy", "pxy", "qxy", "cxy"]
    tagged, plain = ["O", "O", "B-PER", "I-PER", "O"], ["O"] * 5

    def cuts(tags: list[str], training: bool) -> list[int]:
        windows = Windows(Sentences([words], [tags]), letters_tokenizer(), SPEC.label_names, 12, training)
        return [w.start for w in windows.windows]

    assert cuts(plain, training=True) == [0, 3]
    assert cuts(tagged, training=True) == [0, 2]
    assert cuts(tagged, training=False) == cuts(plain, training=False) == [0, 3]


def test_evaluation_cuts_after_punctuation_in_the_second_half_of_a_window() -> None:
    for pause, second in ((3, 4), (1, 5)):  # A cut in the first half would leave a short part.
        words = ["ax", "bx", "cx", "dx", "ex", "fx", "gx", "hx"]
        words[pause] = "."
        windows = Windows(Sentences([words], [["O"] * 8]), letters_tokenizer(), SPEC.label_names, 12, training=False)
        assert [w.start for w in windows.windows] == [0, second]


@pytest.mark.parametrize("limit", [1, 2, 5, 9])
def test_cuts_are_gapless_and_each_run_fits_or_is_one_word(limit: int) -> None:
    draw = random.Random(limit)
    for _ in range(200):
        pieces = [draw.randint(1, 6) for _ in range(draw.randint(1, 30))]
        runs = cut(pieces, limit, [draw.random() < 0.3 for _ in pieces])
        assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
        assert runs[-1][1] == len(pieces)
        assert all(stop > start and (sum(pieces[start:stop]) <= limit or stop - start == 1) for start, stop in runs)


def test_input_that_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length = 2 leaves no room for a word"):
        Windows(toy(2, 0), letters_tokenizer(), SPEC.label_names, 2, training=True)
    tokenizer = letters_tokenizer()
    slow = type("SlowTokenizer", (PreTrainedTokenizerFast,), {"is_fast": property(lambda _: False)})
    tokenizer.__class__ = slow
    with pytest.raises(ConfigError, match="SlowTokenizer cannot tell which word a piece is of"):
        Windows(toy(2, 0), tokenizer, SPEC.label_names, 32, training=True)


def test_a_byte_level_vocabulary_gets_the_blank_before_each_word(tmp_path: Path) -> None:
    """The usual piece of a word begins with the blank in RoBERTa's vocabulary."""
    alphabet = sorted(ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *alphabet, "ab", "Ġab"])}
    core = Tokenizer(BPE(vocabulary, [("a", "b"), ("Ġ", "ab")]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    (tmp_path / "tokenizer.json").write_text(core.to_str())
    RobertaTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    RobertaModel(config).save_pretrained(tmp_path)
    _, tokenizer, _ = load_base(str(tmp_path), None, 0, "token", SPEC.label_names)
    sentence = Sentences([["ab", "ab", "x\ufe0f"]], [["B-PER", "I-PER", "O"]])
    windows = Windows(sentence, tokenizer, SPEC.label_names, 32, training=True)
    assert windows[0]["input_ids"].count(vocabulary["Ġab"]) == 2  # transformers 4.57 puts no special token before them.
    assert windows.tags_of([windows[0]["labels"]]) == sentence.tags


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagger_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    printed = run(*tagger_words("run"), cwd=world).stdout
    assert "note: train: " in printed
    assert "no word left out" in printed
    return world / "run"


def test_a_run_learns_and_its_summary_names_the_main_metric(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["used"] == summary["budget"] == 150
    assert set(summary["after"]) == {
        f"{s}_{m}" for s in ("dev", "test") for m in ("f1", "precision", "recall", "accuracy", "loss")
    }
    assert summary["after"]["dev_loss"] < 0.7 * summary["before"]["dev_loss"]
    assert summary["after"]["dev_f1"] > summary["before"]["dev_f1"] + 0.1
    assert (summary["task"], summary["main_metric"]) == ("ner", "dev_f1")
    assert summary["main"] == summary["after"]["dev_f1"]


def test_the_curve_holds_the_first_split_only(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    curve = [row for row in rows if "eval_dev_f1" in row]
    assert [(row["step"], row["used"]) for row in curve] == [(0, 0), (8, 50), (16, 100), (24, 150)]
    after = json.loads((trained / "summary.json").read_text())["after"]
    for metric in METRICS:
        assert curve[-1][f"eval_dev_{metric}"] == pytest.approx(after[f"dev_{metric}"])
    assert not any("eval_test_loss" in row for row in rows if row["step"] > 0)


def test_eval_gives_the_figures_of_training(trained: Path, world: Path) -> None:
    after = json.loads((trained / "summary.json").read_text())["after"]
    printed = run("eval", "base", "run/delta.safetensors", "--data-dir", "data", cwd=world).stdout
    for split, count in (("dev", 24), ("test", 16)):
        line = next(line for line in printed.splitlines() if line.startswith(f"{split} ({count}): "))
        for metric in ("f1", "precision", "recall", "accuracy"):
            assert f"{metric} {after[f'{split}_{metric}']:.4f}" in line
    one = run("eval", "base", "run/delta.safetensors", "--data", "data/test.conll", cwd=world).stdout
    assert f"eval (16): f1 {after['test_f1']:.4f}" in one


def test_eval_refuses_data_that_do_not_fit_the_delta(trained: Path, world: Path) -> None:
    (world / "other.conll").write_text("Ann B-NAME\n")
    for more, message in (
        (("--data", "other.conll"), "type 'NAME'; the task's types are LOC, PER"),
        (("--task", "sst2"), "unknown NER task 'sst2'"),
        (("--task", "wnut17", "--data-dir", "wnut"), "the delta was trained with LOC, PER"),
        ((), "task 'ner' is your own"),
    ):
        (world / "wnut").mkdir(exist_ok=True)
        (world / "wnut" / "dev.conll").write_text("Ann B-person\n")
        done = run("eval", "base", "run/delta.safetensors", *more, cwd=world, check=False)
        assert done.returncode == 1
        assert message in done.stderr


def test_apply_writes_a_model_that_knows_its_tags(trained: Path, world: Path) -> None:
    run("apply", "base", "run/delta.safetensors", "--output", "merged", cwd=world)
    merged = AutoModelForTokenClassification.from_pretrained(world / "merged")
    assert merged.config.id2label == dict(enumerate(SPEC.label_names))
    base = AutoModelForTokenClassification.from_pretrained(world / "base", num_labels=5)
    unmask.SparseDelta.load(trained / "delta.safetensors").apply(base)
    assert_same_tensors(dict(merged.named_parameters()), dict(base.named_parameters()))


@pytest.mark.parametrize("more", [("--method", "fish", "--set", "num_samples=8"), ("--into", "lora", "--bf16")])
def test_other_ways_to_train_take_tags_too(more: tuple[str, ...], world: Path) -> None:
    output = f"other-{more[1]}"
    run(*tagger_words(output, *more, "--max-steps", 3, "--set", "accumulation=2"), cwd=world)
    summary = json.loads((world / output / "summary.json").read_text())
    assert summary["used"] == summary["budget"] == 150
    printed = run("eval", "base", f"{output}/delta.safetensors", "--data-dir", "data", cwd=world).stdout
    assert "dev (24): f1 " in printed


def test_a_file_alone_has_one_split_and_plain_names(world: Path) -> None:
    settings = ("--task", "ner", "--data", "data/train.conll", "--set", "data_dir=none", "--set", "eval=data/dev.conll")
    run(*tagger_words("file", *settings, "--max-steps", 2), cwd=world)
    summary = json.loads((world / "file" / "summary.json").read_text())
    assert summary["main_metric"] == "f1"
    assert set(summary["after"]) == set(METRICS)


REFUSED = {
    "ner without data": (("--set", "data_dir=none"), "task 'ner' is your own: give data (and eval), or data_dir"),
    "both": (("--data", "data/dev.conll"), "task 'ner' is your own: give data (and eval), or data_dir, and not both"),
    "no room": (("--set", "max_length=2"), "max_length = 2 leaves no room"),
    "divergence": (("--lr", "1e38", "--set", "max_grad_norm=0"), "not finite"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_one_clear_message(what: str, world: Path) -> None:
    more, message = REFUSED[what]
    done = run(*tagger_words("refused"), *more, cwd=world, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["lora", "shira"])
def test_all_linear_layers_leave_a_taggers_head_whole(world, kind):
    run(
        *tagger_words(
            kind,
            "--into",
            kind,
            "--set",
            "lora_targets=all-linear",
            "--set",
            "budget=none",
            "--max-steps",
            2,
            "--method",
            "full",
        ),
        cwd=world,
    )
    delta = unmask.SparseDelta.load(world / kind / "delta.safetensors")
    names = {*delta.sparse, *delta.whole}
    added = {name for name in names if f"{kind}_" in name}
    assert not any("classifier" in name for name in added)
    assert {"query", "key", "value", "intermediate"} <= {part for name in added for part in name.split(".")}
    assert run("eval", "base", f"{kind}/delta.safetensors", "--task", "ner", "--data-dir", "data", cwd=world).stdout
