"""Reads the answer from a generated solution, and compares it with the gold answer.

The rules, in order:

1. The solution ends where the model begins a new exercise by itself (`RESTARTS`).
2. A *marked* answer is the last of: "the answer is ...", "Answer: ...", "#### ...", "\\\\boxed{...}", that has a number (or a
   choice) behind it on its line, or on the next line that is not blank.
3. The first number there counts: "The answer is 5 apples and 3 pears" is 5. If the number's sentence goes on to an equals
   sign, the first number after the last equals sign counts: "The answer is 10 - 3 = 7 apples" is 7.
4. Without a marked answer, the last number of the solution counts. For a multiple choice it is the last letter in brackets,
   else the last letter that stands alone (an "A" before a word in small letters is taken for the article).

Numbers are read exactly (`unmask.lab.tasks.math.numerals`). An answer is right if it is within 0.001 of the gold number,
which is the usual tolerance for these test sets, or if it is the gold letter. ``rule="last"`` leaves out rules 2 and 3: it
takes the last number, or letter, of the solution, which is how many published figures were scored.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from unmask.errors import DataError
from unmask.lab.tasks.math.numerals import find_numbers, read_number, tidied, written
from unmask.reading import shown

AnswerKind = Literal["number", "choice"]
Rule = Literal["marked", "last"]
RULES: tuple[Rule, ...] = ("marked", "last")
RESTARTS = ("### Instruction", "### Input", "### Response", "\nQuestion:", "\nProblem:", "\nQ:", "<|im_start|>")
TOLERANCE = Fraction(1, 1000)

_MARK = re.compile(
    r"####|\\boxed\s*\{|\b(?:answer|choice|option)\b(?:[^.:=\n\d#]{0,40}?\b(?:is|equals|be)\b|\W{0,4}[:=])\W{0,4}?:?",
    re.I,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|\}")
_BRACKETED = re.compile(r"[(\[]\s*([A-Ea-e])\s*[)\]]|(?<![\w'])([A-Ea-e])\)")
_ALONE = re.compile(r"(?<![\w'’.-])([A-E])(?![\w'’]|[.-]\w)")
_ARTICLE = re.compile(r"\s+[a-z]")
_FIRST = re.compile(
    r"\W{0,4}(?:(?:option|choice|letter)\W{1,3})?[(\[*]{0,3}([A-Ea-e])(?![\w'’]|[.-]\w)(?P<after>[)\]*.:,]*)", re.I
)


def solution(text: str) -> str:
    """Returns a generated text up to where the model begins another exercise.

    Example:
        >>> solution("The answer is 5.\\n\\n### Instruction:\\nWhat is 2 + 2?")
        'The answer is 5.'
    """
    at = min([found for restart in RESTARTS if (found := text.find(restart)) >= 0], default=len(text))
    return text[:at].strip()


def extract(text: str, kind: AnswerKind, rule: Rule = "marked") -> str | None:
    """Reads the answer from a generated text: a number, or a letter from A to E if the kind is ``"choice"``.

    Returns:
        The number in its shortest exact form ("1234.5", "17/3"), or the letter; None if there is none.

    Example:
        >>> extract("So 1,200 + 34.5 = 1,234.50. The answer is $1,234.50.", "number")
        '1234.5'
        >>> extract("Therefore the answer is (C).", "choice")
        'C'
    """
    text = tidied(solution(text))
    found = _number if kind == "number" else _choice
    if rule == "marked":
        for mark in reversed(list(_MARK.finditer(text))):
            behind = text[mark.end() :].lstrip(" *:$\n\t")  # the rest of the line, or the next line that is not blank
            answer = found(behind.split("\n", 1)[0], True)
            if answer is not None:
                return answer
    return found(text, False)


def is_right(extracted: str | None, gold: str, kind: AnswerKind) -> bool:
    """Returns True if an extracted answer is the gold one. No answer is a wrong answer.

    Example:
        >>> is_right("3/4", "0.75", "number"), is_right("5.67", "5.666666666666667", "number"), is_right(None, "C", "choice")
        (True, False, False)
    """
    if extracted is None or kind == "choice":
        return extracted == gold
    value, wanted = read_number(extracted), read_number(gold)
    return value is not None and wanted is not None and abs(value - wanted) <= TOLERANCE


def gold_answer(given: object, kind: AnswerKind) -> str:
    """Converts a data set's own answer to the form of `extract`.

    Raises:
        DataError: The answer is not a number, or not a letter from A to E.

    Example:
        >>> gold_answer("1,080.0", "number"), gold_answer(" c ", "choice")
        ('1080', 'C')
    """
    text = str(given).strip()
    if kind == "choice":
        letter = text.strip("()").upper()
        if letter not in set("ABCDE"):
            raise DataError(f"the answer {shown(given)} is not a letter from A to E.")
        return letter
    value = read_number(text)
    if value is None:
        raise DataError(f"the answer {shown(given)} is not a number.")
    return written(value)


def _number(text: str, marked: bool) -> str | None:
    numbers = find_numbers(text)
    if not numbers:
        return None
    if not marked:
        return written(numbers[-1].value)
    end = _SENTENCE_END.search(text, numbers[0].end)
    sentence_end = end.start() if end else len(text)
    equals = text.rfind("=", numbers[0].end, sentence_end)
    behind = [found for found in numbers if equals < found.start < sentence_end] if equals >= 0 else []
    return written((behind or numbers)[0].value)


def _choice(text: str, marked: bool) -> str | None:
    first = _FIRST.match(text) if marked else None
    # "a 5% loss" is no choice: a small letter counts only in brackets, or if nothing but a stop is behind it.
    if first and (first[1].isupper() or first["after"] or not text[first.end() :].strip()):
        return first[1].upper()
    bracketed = [match[1] or match[2] for match in _BRACKETED.finditer(text)]
    alone = [m[1] for m in _ALONE.finditer(text) if not (m[1] == "A" and _ARTICLE.match(text, m.end()))]
    letters = bracketed or alone
    return letters[0 if marked else -1].upper() if letters else None
