"""Tests reading of numbers and answers from generated texts: hard cases, and the solutions of published data sets."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from helpers import ROOT

from unmask.errors import DataError
from unmask.lab.tasks.math.answers import extract, gold_answer, is_right, solution
from unmask.lab.tasks.math.numerals import find_numbers, read_number, tidied, written

REAL = ROOT.parent / "shared" / "data" / "math"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the shared data folder is not next to the checkout")

# ---------------------------------------------------------------- numbers

NUMBERS = {
    "$1,234.50": ["1234.5"],
    "-3": ["-3"],
    "3/4": ["0.75"],
    "72.0": ["72"],
    "72.": ["72"],
    "1,234,567.89 km": ["1234567.89"],
    ".5 and -.5": ["0.5", "-0.5"],
    "25%, 12.5 %": ["25", "12.5"],
    "-$5, $-5, US$5, USD 5, £5, Rs. 5, Rs5, $ 5": ["-5", "-5", "5", "5", "5", "5", "5", "5"],
    "is $5.88": ["5.88"],
    "5 2/3 cups": ["17/3"],
    r"\frac{3}{4}, \dfrac{1}{3}": ["0.75", "1/3"],
    r"\boxed{1{,}234}": ["1234"],
    "\u22127": ["-7"],
    "10-3 = 7": ["10", "3", "7"],
    "10 - 3, 10 -3, (4)-3": ["10", "3", "10", "3", "4", "3"],
    "2*-3, x=-3, 5--3": ["2", "-3", "-3", "5", "-3"],
    "well-3": ["3"],
    "x2 + 4y, B12": ["4"],
    "5kg, the 12th": ["5", "12"],
    "1,2,3 and 12,34": ["1", "2", "3", "12", "34"],
    "1e3, 1.5e-3": ["1000", "0.0015"],
    "12:30": ["12", "30"],
    "3/4/2020": ["3", "4", "2020"],
    "1.2.3": ["1.2"],
    "3/0": [],
    "five": [],
    "9" * 5000: [],  # it is no answer, and the search must end
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:20])
def test_find_numbers_finds_all_numbers_of_a_text(text):
    assert [written(found.value) for found in find_numbers(tidied(text))] == NUMBERS[text]


@pytest.mark.parametrize("value", ["0", "72", "-18.5", "0.001", "-0.75", "17/3", "-1/3", "1234567.125"])
def test_a_written_number_is_read_again(value):
    assert written(Fraction(value)) == value
    assert read_number(value) == Fraction(value)


@pytest.mark.parametrize("text", ["", "5 apples", "about 5", "3 4", "x"])
def test_read_number_gives_none_for_any_other_text(text):
    assert read_number(text) is None


# ---------------------------------------------------------------- answers that are numbers

ANSWERS = {
    "The answer is 5 apples and 3 pears": "5",
    "The answer is $1,234.50.": "1234.5",
    "The answer is -3.": "-3",
    "the answer is 3/4 of a cup": "0.75",
    "The answer is 72.0": "72",
    "The answer is 25%.": "25",
    "The answer is 10 - 3 = 7 apples. Check: 2 + 2 = 4.": "7",
    "The answer is 18 / 6 = 3": "3",
    "The answer is x = 5": "5",
    "The answer is 5 (since 2 + 3 = 5).": "5",
    "She sold 9.\n#### 1,080": "1080",
    r"So $x = 17$ and \boxed{\frac{3}{4}}.": "0.75",
    r"The final answer is $\boxed{18}$.": "18",
    "The answer is:\n\n5 dollars\nfor 2 days": "5",
    "**Answer:** 7 apples, 2 left": "7",
    "Answer: The answer is 12. That took 3 steps.": "12",
    "The answer to the question is 42!": "42",
    "The correct answer would be 9, not 8": "9",
    "The answer is Rs. 50.": "50",
    "The answer is 4. Wait, that is wrong. The answer is 6.": "6",
    "The answer is five, as 3 + 2 = 5": "5",  # number words are not read, so this is the last number
    "3 * 4 = 12, so 12 apples": "12",
    "There is no answer.": None,
    "": None,
    "So it is 5.\n\n### Instruction:\nWhat is 3 + 6?\n\n### Response:\nThe answer is 9.": "5",
    "The answer is 5.\nQuestion: how many are 9?": "5",
}


@pytest.mark.parametrize("text", ANSWERS, ids=lambda text: text[:30])
def test_extract_reads_the_number_that_answers(text):
    assert extract(text, "number") == ANSWERS[text]


def test_the_rule_last_reads_the_last_number_or_letter():
    assert extract("The answer is 5 apples and 3 pears", "number", "last") == "3"
    assert extract("It is (B). The answer is C", "choice", "last") == "B"  # brackets come before a letter alone


# ---------------------------------------------------------------- answers that are letters

CHOICES = {
    "answer is (C)": "C",
    "Therefore, the answer is (C) 62 m.": "C",
    "The answer is C.": "C",
    "the answer is c": "C",
    "answer: (d) 62 m": "D",
    "Answer: B) 27": "B",
    "the answer is **D**": "D",
    r"the answer is \boxed{E}": "E",
    "The answer is A because 3 + 4 = 7": "A",
    "The correct option is B": "B",
    "option (E) is right": "E",
    "The answer is option B.": "B",
    "The correct choice is (A) 5.": "A",
    "The answer is:\n\nD": "D",
    "(A) is 3, (B) is 4. I take (B)": "B",
    "A train leaves, so it must be D": "D",
    "A train leaves.": None,
    "The answer is a 5% loss": None,
    "The answer is a 5% loss, which is (B)": "B",
    "The answer is Charlie's": None,
    "The answer is 62 m.": None,  # a number is not matched with the choices
    "C": "C",
    "": None,
}


@pytest.mark.parametrize("text", CHOICES, ids=lambda text: text[:30])
def test_extract_reads_the_letter_that_answers(text):
    assert extract(text, "choice") == CHOICES[text]


# ---------------------------------------------------------------- right or wrong


@pytest.mark.parametrize(
    ("extracted", "gold", "right"),
    [
        ("72", "72", True),
        ("0.75", "3/4", True),
        ("17/3", "5.666666666666667", True),
        ("5.667", "5.666666666666667", True),
        ("5.67", "5.666666666666667", False),
        ("0.001", "0", True),
        ("0.0011", "0", False),
        ("-3", "3", False),
        (None, "3", False),
    ],
)
def test_a_number_is_right_within_a_thousandth(extracted, gold, right):
    assert is_right(extracted, gold, "number") is right


def test_a_letter_is_right_if_it_is_the_same():
    assert is_right("C", "C", "choice")
    assert not is_right("B", "C", "choice")
    assert not is_right(None, "C", "choice")


def test_gold_answers_are_checked():
    assert [gold_answer(given, "number") for given in ("8.0", " 1,080 ", 8, 2.5)] == ["8", "1080", "8", "2.5"]
    assert gold_answer("(c)", "choice") == "C"
    with pytest.raises(DataError, match="'eight' is not a number"):
        gold_answer("eight", "number")
    with pytest.raises(DataError, match="'F' is not a letter from A to E"):
        gold_answer("F", "choice")


def test_a_solution_ends_where_another_exercise_begins():
    assert solution(" 5 apples \n### Instruction:\nmore") == "5 apples"
    assert solution("") == ""


@real
def test_every_gold_solution_of_gsm8k_gives_its_answer():
    for split in ("train", "test"):
        for line in (REAL / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)["answer"]
            gold = gold_answer(answer.rpartition("####")[2], "number")
            assert extract(answer, "number") == gold, answer


@real
@pytest.mark.parametrize("name", ["SVAMP", "MultiArith", "AddSub", "SingleEq", "AQuA"])
def test_samples_of_another_model_nearly_all_give_an_answer(name):
    """The column ``output`` of the files is a model's sample, and ends in "The answer is ..." as it was published."""
    rows = json.loads((REAL / name / "test.json").read_text(encoding="utf-8"))
    kind = "choice" if name == "AQuA" else "number"
    found = [extract(row["output"], kind) for row in rows]
    assert sum(answer is None for answer in found) <= 2
    right = [is_right(answer, gold_answer(row["answer"], kind), kind) for answer, row in zip(found, rows, strict=True)]
    assert 0.4 < sum(right) / len(rows) < 1
