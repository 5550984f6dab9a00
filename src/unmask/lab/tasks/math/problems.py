"""Arithmetic word problems: GSM8K and Math10K to train on, six test sets to solve."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unmask.errors import DataError
from unmask.lab.tasks.hub import load_splits, split_table
from unmask.lab.tasks.math.answers import AnswerKind, extract, gold_answer, is_right
from unmask.lab.tasks.split import held_rows, text_key
from unmask.lab.tasks.tables import Table, listing, placed, read_table, unknown_column

Split = Literal["train", "test"]
HELD_OUT = 120  # problems for the loss along the run
ANSWER_LINE = "The answer is {}."  # what GSM8K's "#### 72" becomes in training: one form for all sets

_HUB_GSM8K = ("openai/gsm8k", "main")
_ENDINGS = tuple(suffix + zipped for suffix in (".json", ".jsonl") for zipped in ("", ".gz"))
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class ArithmeticSpec:
    """A set of word problems.

    Attributes:
        name: E.g. ``"gsm8k"``.
        folder: Its folder, as the data are published.
        kind: What its answers are: ``"number"``, or ``"choice"`` (a letter from A to E).
        splits: Which there are: ``"train"`` to train on, ``"test"`` to solve.
    """

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
# names of the one published file of Math10K
_LOOSE: Mapping[str, tuple[str, ...]] = {"math10k": ("math_10k.json", "ft-training_set/math_10k.json")}


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Attributes:
        question: The text to answer; a multiple choice holds its choices.
        context: A further input, mostly "".
        solution: What training teaches to write, the answer included; "" in a test set.
        answer: The gold answer, in the form of `unmask.lab.tasks.math.answers.extract`.
        kind: Of the answer.
    """

    question: str
    context: str
    solution: str
    answer: str
    kind: AnswerKind


@dataclass(frozen=True)
class ArithmeticData:
    """Problems to train on.

    Attributes:
        name: Of the set.
        train: To train on.
        held_out: For the loss along the run; no question stands on both sides.
        notes: What the user should know of the loading.
    """

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    notes: tuple[str, ...] = ()


def load_problems(name: str, split: Split, data_dir: str | Path | None = None) -> list[Problem]:
    """Loads one split of a set.

    Args:
        name: Of `ARITHMETIC`.
        split: ``"train"`` or ``"test"``.
        data_dir: The folder that holds the sets' folders (``SVAMP/test.json``, ``gsm8k/train.jsonl``, for Math10K also
            ``math_10k.json`` itself), or the set's own. Files are json lists of {instruction, input, output, answer}, or
            jsonl of GSM8K's {question, answer}. None: the hub, for gsm8k.

    Raises:
        DataError: An unknown set or split, a missing file, or a bad row.
    """
    spec = _spec(name, split)
    if data_dir is None:
        if name != "gsm8k":
            raise DataError(
                f"{name} is read from files; give the folder that holds {spec.folder}/{split}.json (data_dir)."
            )
        splits = load_splits(*_HUB_GSM8K, "give the folder of its files with data_dir")
        table = split_table(splits, split, ":".join(_HUB_GSM8K), ("question", "answer"))
    else:
        table = read_table(_file(spec, split, Path(data_dir)))
    return _problems(table, spec, split)


def load_arithmetic(
    name: str, data_dir: str | Path | None = None, *, held_out: int = HELD_OUT, seed: int = 0
) -> ArithmeticData:
    """Loads a set to train on, and holds some problems out.

    Args:
        name: ``"gsm8k"`` or ``"math10k"``.
        data_dir: As of `load_problems`.
        held_out: How many problems to hold out, at most a tenth.
        seed: Of the choice.

    Raises:
        DataError: As `load_problems`; too few problems to hold any out.
    """
    problems = load_problems(name, "train", data_dir)
    count = max(1, min(held_out, len(problems) // 10))
    with placed(name if data_dir is None else _file(_spec(name, "train"), "train", Path(data_dir))):
        held = held_rows([text_key(problem.question) for problem in problems], count, seed)
    notes = [f"{len(held):,} of {len(problems):,} problems are held out for the loss along the run (seed {seed})"]
    wrong = sum(not is_right(extract(p.solution, p.kind), p.answer, p.kind) for p in problems)
    if wrong:
        notes.append(f"{wrong:,} of {len(problems):,} solutions of {name} do not end in the row's own answer")
    return ArithmeticData(
        name,
        [problem for row, problem in enumerate(problems) if row not in held],
        [problems[row] for row in sorted(held)],
        tuple(notes),
    )


def seen_in_training(train: Sequence[Problem], test: Sequence[Problem]) -> int:
    """How many test questions are in the training data too, up to case and blanks."""
    known = {text_key(problem.question) for problem in train}
    return sum(text_key(problem.question) in known for problem in test)


def _spec(name: str, split: Split) -> ArithmeticSpec:
    if name not in ARITHMETIC:
        raise DataError(f"unknown arithmetic set {name!r}; there are {', '.join(ARITHMETIC)}.")
    if split not in ARITHMETIC[name].splits:
        others = TRAINING_SETS if split == "train" else TEST_SETS
        raise DataError(f"{name} has no {split} split; {', '.join(others)} have.")
    return ARITHMETIC[name]


def _file(spec: ArithmeticSpec, split: Split, given: Path) -> Path:
    if not given.is_dir():
        raise DataError(f"there is no data folder {str(given)!r}; {listing(given.parent)}.")
    own = [given] if _plain(given.resolve().name) == spec.name else []
    folders = own or [path for path in sorted(given.iterdir()) if path.is_dir() and _plain(path.name) == spec.name]
    names = [folder / (split + ending) for folder in folders for ending in _ENDINGS]
    there = [path for path in (*names, *(given / loose for loose in _LOOSE.get(spec.name, ()))) if path.is_file()]
    if len(there) > 1:
        raise DataError(f"{split} of {spec.name} is there twice: {there[0]} and {there[1]}; leave one.")
    if not there:
        raise DataError(
            f"there is no {spec.folder}/{split}.json or .jsonl{_or_loose(spec.name)}; {listing((folders or [given])[0])}."
        )
    return there[0]


def _or_loose(name: str) -> str:
    return "".join(f", and no {loose}" for loose in _LOOSE.get(name, ()))


def _plain(name: str) -> str:
    """``Math_10K``, ``math-10k`` and the like all give ``math10k``."""
    return re.sub(r"[-_ ]", "", name.lower())


def _problems(table: Table, spec: ArithmeticSpec, split: Split) -> list[Problem]:
    question = "instruction" if "instruction" in table.columns else "question"
    if question not in table.columns or "answer" not in table.columns:
        missing = "instruction (or question)" if question not in table.columns else "answer"
        raise unknown_column(table.source, missing, table.columns)
    if split == "train" and question == "instruction":
        table.column("output")
    return [_problem(table, row, question, spec, split) for row in range(len(table))]


def _problem(table: Table, row: int, question: str, spec: ArithmeticSpec, split: Split) -> Problem:
    cells = {name: values[row] for name, values in table.columns.items()}
    text = _text(table, row, question, cells[question])
    solution, given = _text(table, row, "output", cells.get("output") or "", True), cells["answer"]
    if question == "question":
        solution, given = _gsm8k(table, row, str(given))
    # Math10K mixes numbers and letters
    kind: AnswerKind = "choice" if spec.kind == "choice" or str(given).strip() in set("ABCDE") else "number"
    with placed(table.where(row)):
        answer = gold_answer(given, kind)
    if split == "train" and not solution:
        raise DataError(f"{table.where(row)}: the solution in column 'output' is empty; mend or drop the row.")
    context = _text(table, row, "input", cells.get("input") or "", True)
    return Problem(text, context, solution if split == "train" else "", answer, kind)


def _gsm8k(table: Table, row: int, answer: str) -> tuple[str, str]:
    """GSM8K's answer column as a solution without calculator marks, and the gold answer."""
    reasoning, marks, gold = answer.rpartition("####")
    if not marks:
        raise DataError(f"{table.where(row)}: the answer has no '#### ' line; GSM8K's answers end in one.")
    return f"{_CALCULATOR.sub('', reasoning).strip()}\n{ANSWER_LINE.format(gold.strip())}", gold


def _text(table: Table, row: int, column: str, value: object, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{table.where(row)}: column {column!r} holds {value!r:.60}, which is no text.")
    if not value.strip() and not may_be_empty:
        raise DataError(f"{table.where(row)}: the text in column {column!r} is empty; mend or drop the row.")
    return value.strip()
