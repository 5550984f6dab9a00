"""Reads numbers exactly, in the forms in which people and models write them.

A number is an optional sign and currency, digits with or without thousands separators, decimals, an exponent, or a fraction
(``3/4``, ``5 2/3``, ``\\frac{3}{4}``). A percent sign, a unit and a closing full stop are left out: "25%" is 25, and "72." is 72.
Digits after a letter (``x2``), number words ("five") and a fraction with a zero denominator are not numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_CURRENCY = r"(?:(?:\b(?:US|A|C))?[$€£¥₹]|\b(?:USD|EUR|GBP|INR|Rs\b\.?|Rs(?=\d)))\s?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,2}}(?![\d.]))?"
_LATEX = r"\\[dt]?frac\s*\{\s*(?P<above>\d+)\s*\}\s*\{\s*(?P<below>\d+)\s*\}"
_NUMBER = re.compile(
    rf"(?P<sign>-)?(?:{_CURRENCY})?(?P<inner>-)?"
    rf"(?:{_LATEX}"
    r"|(?<!/)(?:(?P<whole>\d+)[ ])?(?P<top>\d+)/(?P<bottom>\d+)(?![\d/]|\.\d)"
    rf"|(?P<decimal>{_DECIMAL}))"
)
_MINUS = str.maketrans({"\u2212": "-", "\u2012": "-", "\ufe63": "-", "\uff0d": "-", "\u202f": " ", "\u00a0": " "})
_LONGEST = 100  # A model that repeats itself writes thousands of digits, and they are no answer.


@dataclass(frozen=True)
class Found:
    """A number in a text: its exact value, the place of its first character, and the place after its last one."""

    value: Fraction
    start: int
    end: int


def tidied(text: str) -> str:
    """Unifies minus signs, blanks and LaTeX's thousands separators, as `find_numbers` needs it.

    Example:
        >>> tidied("\\u22121{,}234 \\\\$5")
        '-1,234 $5'
    """
    return re.sub(r"\{,\}|(?<=\d)\\[,!](?=\d{3})", ",", text.translate(_MINUS)).replace("\\$", "$").replace("\\%", "%")


def find_numbers(text: str) -> list[Found]:
    """Finds all numbers of a text, in order.

    A minus is a sign if it touches its number and there is nothing before it to subtract from: "-3" and "is -3" are negative,
    but the second numbers of "10-3", "10 - 3" and "(4)-3" are not.

    Example:
        >>> [str(found.value) for found in find_numbers("$1,234.50 less 3/4 of -2 is 10-3.")]
        ['2469/2', '3/4', '-2', '10', '3']
    """
    found, at = [], 0
    while match := _NUMBER.search(text, at):
        at = max(match.end(), match.start() + 1)
        before = text[: match.start()]
        last, last_sign = before[-1:], before.rstrip(" ")[-1:]
        in_a_word = last.isalpha() or last == "_"
        in_a_number = re.fullmatch(r"\d\.", before[-2:]) or (last.isdigit() and match[0].startswith("."))
        if len(match[0]) > _LONGEST or (not match["sign"] and (in_a_word or in_a_number)):
            continue
        if match["decimal"]:
            value = Fraction(match["decimal"].replace(",", ""))
        else:
            above, below = int(match["above"] or match["top"]), int(match["below"] or match["bottom"])
            if below == 0:
                continue
            value = int(match["whole"] or 0) + Fraction(above, below)
        subtracts = last.isalpha() or last_sign.isdigit() or last_sign in tuple(")]}%")
        negative = match["inner"] or (match["sign"] and not subtracts)
        found.append(Found(-value if negative else value, match.start(), match.end()))
    return found


def read_number(text: str) -> Fraction | None:
    """Returns the value of a text that is one number and nothing else; any other text gives None.

    Example:
        >>> read_number(" 1,080 "), read_number("5 apples")
        (Fraction(1080, 1), None)
    """
    text = tidied(text).strip()
    numbers = find_numbers(text)
    whole = len(numbers) == 1 and text[: numbers[0].start] == "" and text[numbers[0].end :] in ("", ".", "%")
    return numbers[0].value if whole else None


def written(value: Fraction) -> str:
    """Writes a number in its shortest exact form: an integer, a decimal, else a fraction. `read_number` reads it again.

    Example:
        >>> written(Fraction(72)), written(Fraction(-37, 2)), written(Fraction(17, 3))
        ('72', '-18.5', '17/3')
    """
    decimals = range(value.denominator.bit_length())  # a decimal has no more places than its denominator has bits
    places = next((count for count in decimals if 10**count % value.denominator == 0), None)
    return str(value) if places is None else f"{Decimal(f'{value * 10**places}e-{places}'):f}"
