"""Tests word problems from files, and prompts: formats, held-out problems, refusals, and the tokens that carry loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from tiny_llama import addition, byte_tokenizer, math_folder

from unmask.errors import ConfigError, DataError
from unmask.lab.tasks.math.problems import TEST_SETS, Problem, load_arithmetic, load_problems, seen_in_training
from unmask.lab.tasks.math.prompts import (
    ALPACA,
    IGNORED,
    Completions,
    PadRight,
    Prompter,
    load_template,
    pad,
    render,
)

REAL = ROOT.parent / "shared" / "data" / "math"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the shared data folder is not next to the checkout")
PROBLEM = Problem("What is 2 and 3?", "", "The answer is 5.", "5", "number")


def put(path: Path, rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path.parent


# ---------------------------------------------------------------- data


def test_problems_load_from_math10ks_format(tmp_path):
    problems = load_problems("math10k", "train", math_folder(tmp_path))
    assert len(problems) == 40
    assert problems[2] == Problem("What is 2 and 7? Well? Well?", "", "The answer is 9.", "9", "number")


def test_gsm8ks_format_loses_its_calculator_marks(tmp_path):
    problem = load_problems("gsm8k", "train", math_folder(tmp_path))[2]
    assert problem == Problem("What is 2 and 7? Well? Well?", "", "So it is.\nThe answer is 9.", "9", "number")
    assert load_problems("gsm8k", "test", tmp_path / "gsm8k")[0].solution == ""  # `data_dir` is the folder of the set


def test_math10k_holds_letters_too(tmp_path):
    row = {"instruction": "Which? (A) 1 (B) 2", "input": "", "output": "The answer is (B).", "answer": "B"}
    folder = put(tmp_path / "Math-10K" / "train.json", [row, *addition(11)])
    data = load_arithmetic("math10k", folder.parent, seed=1)
    assert {problem.kind for problem in [*data.train, *data.held_out]} == {"choice", "number"}
    assert len(data.notes) == 1  # no solution contradicts its answer


def test_no_question_is_both_trained_on_and_held_out(tmp_path):
    rows = addition(30) + addition(30)  # each problem is there twice
    data = load_arithmetic("math10k", put(tmp_path / "math10k" / "train.json", rows), seed=0)
    assert (len(data.train), len(data.held_out)) == (54, 6)
    assert seen_in_training(data.train, data.held_out) == 0
    assert load_arithmetic("math10k", tmp_path, seed=0) == data
    assert load_arithmetic("math10k", tmp_path, seed=1).held_out != data.held_out


def test_solutions_that_contradict_the_answer_are_noted(tmp_path):
    rows = addition(20)
    rows[3]["answer"] = "99"
    data = load_arithmetic("math10k", put(tmp_path / "math10k" / "train.json", rows))
    assert "1 of 20 solutions of math10k do not end in the row's own answer" in data.notes


def test_test_questions_in_the_training_data_are_counted(tmp_path):
    folder = math_folder(tmp_path)
    train = load_problems("math10k", "train", folder)
    assert seen_in_training(train, load_problems("svamp", "test", folder)) == 0
    assert seen_in_training(train, train[:7]) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "eight"}, r"record 2: the answer 'eight' is not a number"),
        ({"answer": None}, r"record 2: the answer None is not a number"),
        ({"output": ""}, r"record 2: the solution in column 'output' is empty"),
        ({"instruction": " "}, r"record 2: the text in column 'instruction' is empty"),
        ({"instruction": 7}, r"record 2: column 'instruction' holds 7, which is not a text"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    rows = addition(3)
    rows[1] |= change
    with pytest.raises(DataError, match=message):
        load_problems("math10k", "train", put(tmp_path / "math10k" / "train.json", rows))


def test_problems_that_cannot_be_loaded_are_refused(tmp_path):
    folder = math_folder(tmp_path)
    with pytest.raises(DataError, match=r"unknown arithmetic set 'x'; there are gsm8k, svamp"):
        load_problems("x", "test", folder)
    with pytest.raises(DataError, match=r"svamp has no train split; gsm8k, math10k have"):
        load_arithmetic("svamp", folder)
    with pytest.raises(DataError, match=r"no AQuA/test\.json or \.jsonl; .* holds MultiArith, SVAMP, gsm8k"):
        load_problems("aqua", "test", folder)
    with pytest.raises(DataError, match=r"no Math10K/train\.json or \.jsonl, and no math_10k\.json"):
        load_problems("math10k", "train", folder / "SVAMP")
    with pytest.raises(DataError, match=r"svamp is read from files; give the folder"):
        load_problems("svamp", "test")
    put(folder / "math10k" / "train.json", addition(3))
    with pytest.raises(DataError, match=r"train of math10k is there twice"):
        load_problems("math10k", "train", folder)
    (folder / "gsm8k" / "test.jsonl").write_text('{"question": "q?", "answer": "5"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: the answer has no '#### ' line"):
        load_problems("gsm8k", "test", folder)
    with pytest.raises(DataError, match=r"no column 'instruction \(or question\)'; its columns are a"):
        load_problems("math10k", "train", put(tmp_path / "other" / "math10k" / "train.json", [{"a": 1}]))


@real
def test_the_published_sets_have_their_sizes():
    sizes = {name: len(load_problems(name, "test", REAL)) for name in TEST_SETS}
    assert sizes == {"gsm8k": 1319, "svamp": 1000, "multiarith": 600, "addsub": 395, "aqua": 254, "singleeq": 508}
    data = load_arithmetic("gsm8k", REAL)
    assert (len(data.train), len(data.held_out)) == (7353, 120)
    assert len(data.notes) == 1
    assert "<<" not in "".join(problem.solution for problem in data.train)


# ---------------------------------------------------------------- prompts


def test_a_paragraph_without_an_input_is_left_out():
    plain, with_input = render(ALPACA, "Do {input} it."), render(ALPACA, "Do it.", "To this.")
    assert "### Input" not in plain
    assert "### Instruction:\nDo {input} it.\n\n### Response:\n" in plain
    assert "### Instruction:\nDo it.\n\n### Input:\nTo this.\n\n### Response:\n" in with_input


def test_templates_come_from_files(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("Q: {instruction}\nA:", encoding="utf-8")
    assert render(load_template(str(path)), "1 + 1?", "Quick.") == "Q: 1 + 1?\nQuick.\nA:"
    assert load_template("chat") is None
    path.write_text("Q:", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"does not hold \{instruction\}"):
        load_template(str(path))
    with pytest.raises(ConfigError, match=r"prompt = 'apaca'; it must be alpaca, chat, or a text file"):
        load_template("apaca")


def test_every_template_gives_at_most_one_begin_token(tmp_path):
    """Llama's tokenizer adds a begin token, some tokenizers add none, and a chat template has one in its text."""
    adds, adds_not = byte_tokenizer(), byte_tokenizer(begin=False)
    for tokenizer, prompt, count in (
        (adds, "alpaca", 1),
        (adds_not, "alpaca", 0),
        (adds, "chat", 1),
        (adds_not, "chat", 1),
    ):
        ids = Prompter(tokenizer, prompt).prompt_ids(PROBLEM)
        assert ids.count(tokenizer.bos_token_id) == count, (prompt, count)
        assert tokenizer.eos_token_id not in ids or prompt == "chat"
    path = tmp_path / "t.txt"
    path.write_text("<s>Q: {instruction}", encoding="utf-8")
    assert Prompter(adds, str(path)).prompt_ids(PROBLEM).count(1) == 1
    adds.chat_template = (
        "<s>{{ messages[0]['content'] }}"  # a converted tokenizer calls this mark of turns its begin token
    )
    assert Prompter(adds, "alpaca").prompt_ids(PROBLEM).count(1) == 0


def test_a_chat_prompt_is_the_tokenizers_own():
    assert Prompter(byte_tokenizer(), "chat").text(PROBLEM) == "<s>[user]What is 2 and 3?</s>[assistant]"


def test_prompts_that_a_tokenizer_cannot_make_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template; take prompt = alpaca"):
        Prompter(tokenizer, "chat")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        Prompter(tokenizer, "alpaca")


def test_only_the_completion_carries_loss():
    tokenizer = byte_tokenizer()
    prompter = Prompter(tokenizer)
    row = Completions([PROBLEM], prompter, 512)[0]
    prompt = len(prompter.prompt_ids(PROBLEM))
    assert row["labels"][:prompt] == [IGNORED] * prompt
    assert row["labels"][prompt:] == row["input_ids"][prompt:]
    assert tokenizer.decode(row["input_ids"][prompt:]) == "The answer is 5.</s>"
    # training sees the ids that generation starts from
    assert row["input_ids"][:prompt] == prompter.prompt_ids(PROBLEM)
    whole = Completions([PROBLEM], prompter, 512, train_on_prompt=True)[0]
    assert whole["labels"] == whole["input_ids"] == row["input_ids"]


def test_a_short_max_length_cuts_and_drops_completions():
    prompter = Prompter(byte_tokenizer())
    length = len(prompter.prompt_ids(PROBLEM))
    longer = Problem(PROBLEM.question + " Well?", "", "5", "5", "number")
    cut = Completions([PROBLEM, longer], prompter, length + 3)
    assert (len(cut), cut.cut, cut.dropped) == (1, 1, 1)
    assert len(cut[0]["input_ids"]) == length + 3
    with pytest.raises(ConfigError, match=rf"every prompt has {length} tokens or more; raise max_length"):
        Completions([PROBLEM, longer], prompter, length)


def test_batches_are_padded_on_the_right_with_labels_that_count_for_nothing():
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]},
            {"input_ids": [8], "attention_mask": [1], "labels": [8]}]  # fmt: skip
    batch = PadRight(2)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert pad([[1], [2, 3]], 0, left=True).tolist() == [[0, 1], [2, 3]]
    assert pad([[1]], 0).dtype == torch.int64
