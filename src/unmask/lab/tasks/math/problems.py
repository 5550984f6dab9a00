"""Loads arithmetic word problems: GSM8K and Math10K for training, and six test sets to solve."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unmask.errors import DataError
from unmask.lab.tasks.hub import load_splits, split_table
from unmask.lab.tasks.math.answers import AnswerKind, extract, gold_answer, is_right
from unmask.lab.tasks.split import held_rows, shared, text_key
from unmask.lab.tasks.tables import Table, listing, placed, plain_name, read_table, unknown_column
from unmask.reading import choices

Split = Literal["train", "test"]
HELD_OUT = 120
"""The number of problems that are held out for the loss along the run, at most."""
ANSWER_LINE = "The answer is {}."
"""The last line of a solution. In training it replaces GSM8K's "#### 72", so that all sets have one form."""

_HUB_GSM8K = ("openai/gsm8k", "main")
_ENDINGS = tuple(suffix + zipped for suffix in (".json", ".jsonl") for zipped in ("", ".gz"))
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class ArithmeticSpec:
    """A set of word problems: its name, its folder in the published data, the kind of its answers, and its splits."""

    name: str
    folder: str
    kind: AnswerKind
    splits: tuple[Split, ...]


ARITHMETIC: Mapping[str, ArithmeticSpec] = {
    spec.name: spec
    for spec in (
        ArithmeticSpec("gsm8k", "gsm8k", "number", ("train", "test")),
        ArithmeticSpec("svamp", "SVAMP", "number", ("test",)),
        ArithmeticSpec("multiarith", "MultiArith", "number", ("test",)),
        ArithmeticSpec("addsub", "AddSub", "number", ("test",)),
        ArithmeticSpec("aqua", "AQuA", "choice", ("test",)),
        ArithmeticSpec("singleeq", "SingleEq", "number", ("test",)),
        ArithmeticSpec("math10k", "Math10K", "number", ("train",)),
    )
}
TEST_SETS = tuple(name for name, spec in ARITHMETIC.items() if "test" in spec.splits)
TRAINING_SETS = tuple(name for name, spec in ARITHMETIC.items() if "train" in spec.splits)
# The names of the one published file of Math10K.
_LOOSE: Mapping[str, tuple[str, ...]] = {"math10k": ("math_10k.json", "ft-training_set/math_10k.json")}


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Attributes:
        question: The text to answer. That of a multiple choice holds the choices.
        context: A further input, in most cases "".
        solution: The text that training teaches to write, the answer included; "" in a test set.
        answer: The gold answer, in the form of `unmask.lab.tasks.math.answers.extract`.
        kind: The kind of the answer.
    """

    question: str
    context: str
    solution: str
    answer: str
    kind: AnswerKind


@dataclass(frozen=True)
class ArithmeticData:
    """The problems of a set to train on, those held out for the loss along the run, and notes for the user.

    No question is on both sides.
    """

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    notes: tuple[str, ...] = ()


def load_problems(name: str, split: Split, data_dir: str | Path | None = None) -> list[Problem]:
    """Loads one split of a set, which is a key of `ARITHMETIC`.

    ``data_dir`` holds the sets' folders (``SVAMP/test.json``, ``gsm8k/train.jsonl``, and for Math10K also ``math_10k.json``
    itself), or is the set's own folder. Files are json lists of {instruction, input, output, answer}, or jsonl of GSM8K's
    {question, answer}. None means the hub, which has gsm8k.

    Raises:
        DataError: The set or split is unknown, a file is missing, or a row is bad.
    """
    if name not in ARITHMETIC:
        raise DataError(f"unknown arithmetic set {name!r}; there are {choices(name, ARITHMETIC)}.")
    spec = ARITHMETIC[name]
    if split not in spec.splits:
        others = TRAINING_SETS if split == "train" else TEST_SETS
        raise DataError(f"{name} has no {split} split; {', '.join(others)} have.")
    if data_dir is None:
        if name != "gsm8k":
            raise DataError(f"{name} is read from files; give the folder of {spec.folder}/{split}.json (data_dir).")
        splits = load_splits(*_HUB_GSM8K, "give the folder of its files with data_dir")
        table = split_table(splits, split, ":".join(_HUB_GSM8K), ("question", "answer"))
    else:
        table = read_table(_file(spec, split, Path(data_dir)))
    question = "instruction" if "instruction" in table.columns else "question"
    if question not in table.columns or "answer" not in table.columns:
        missing = "instruction (or question)" if question not in table.columns else "answer"
        raise unknown_column(table.source, missing, table.columns)
    if split == "train" and question == "instruction":
        table.column("output")
    problems = []
    for row in range(len(table)):
        cells = {column: values[row] for column, values in table.columns.items()}
        text, context = _text(table, row, question, cells), _text(table, row, "input", cells, optional=True)
        solution, given = _text(table, row, "output", cells, optional=True), cells["answer"]
        if question == "question":  # GSM8K's answer holds the solution, with calculator marks, and the gold answer
            reasoning, marks, given = str(given).rpartition("####")
            if not marks:
                raise DataError(f"{table.where(row)}: the answer has no '#### ' line; GSM8K's answers end in one.")
            solution = f"{_CALCULATOR.sub('', reasoning).strip()}\n{ANSWER_LINE.format(given.strip())}"
        # Math10K has numbers and letters.
        kind: AnswerKind = "choice" if spec.kind == "choice" or str(given).strip() in set("ABCDE") else "number"
        with placed(table.where(row)):
            answer = gold_answer(given, kind)
        if split == "train" and not solution:
            raise DataError(f"{table.where(row)}: the solution in column 'output' is empty; mend or drop the row.")
        problems.append(Problem(text, context, solution if split == "train" else "", answer, kind))
    return problems


def load_arithmetic(
    name: str, data_dir: str | Path | None = None, *, held_out: int = HELD_OUT, seed: int = 0
) -> ArithmeticData:
    """Loads a set to train on with `load_problems`, and holds problems out: ``held_out``, but at most a tenth.

    Raises:
        DataError: The reasons are those of `load_problems`, or there are too few problems to hold any out.
    """
    problems = load_problems(name, "train", data_dir)
    count = max(1, min(held_out, len(problems) // 10))
    with placed(name if data_dir is None else _file(ARITHMETIC[name], "train", Path(data_dir))):
        held = held_rows([text_key(problem.question) for problem in problems], count, seed)
    notes = [f"{len(held):,} of {len(problems):,} problems are held out for the loss along the run (seed {seed})"]
    wrong = sum(not is_right(extract(p.solution, p.kind), p.answer, p.kind) for p in problems)
    if wrong:
        notes.append(f"{wrong:,} of {len(problems):,} solutions of {name} do not end in the row's own answer")
    train = [problem for row, problem in enumerate(problems) if row not in held]
    return ArithmeticData(name, train, [problems[row] for row in sorted(held)], tuple(notes))


def seen_in_training(train: Sequence[Problem], test: Sequence[Problem]) -> int:
    """Counts the test questions that are also in the training data, up to case and blanks."""
    return shared([text_key(problem.question) for problem in train], [text_key(problem.question) for problem in test])


def _file(spec: ArithmeticSpec, split: Split, given: Path) -> Path:
    if not given.is_dir():
        raise DataError(f"there is no data folder {str(given)!r}; {listing(given.parent)}.")
    own = [given] if plain_name(given.resolve().name) == spec.name else []
    folders = own or [path for path in sorted(given.iterdir()) if path.is_dir() and plain_name(path.name) == spec.name]
    names = [folder / (split + ending) for folder in folders for ending in _ENDINGS]
    loose = _LOOSE.get(spec.name, ())
    there = [path for path in (*names, *(given / name for name in loose)) if path.is_file()]
    if len(there) > 1:
        raise DataError(f"{split} of {spec.name} is there twice: {there[0]} and {there[1]}; leave one.")
    if not there:
        or_loose = "".join(f", and no {name}" for name in loose)
        raise DataError(
            f"there is no {spec.folder}/{split}.json or .jsonl{or_loose}; {listing((folders or [given])[0])}."
        )
    return there[0]


def _text(table: Table, row: int, column: str, cells: Mapping[str, object], optional: bool = False) -> str:
    value = cells.get(column) or "" if optional else cells[column]
    if not isinstance(value, str):
        raise DataError(f"{table.where(row)}: column {column!r} holds {value!r:.60}, which is not a text.")
    if not value.strip() and not optional:
        raise DataError(f"{table.where(row)}: the text in column {column!r} is empty; mend or drop the row.")
    return value.strip()
