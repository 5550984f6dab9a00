"""Reads JSON and text within bounds, and checks that plain values have the form that is expected.

A *form* is a function ``(value, where) -> value``. It returns the value, or raises `Malformed` with ``where`` in its text.
Forms can be combined: ``fields({"shapes": mapping(items(count))})``. A reader turns `Malformed` into its own error, which
names the file: ``with refusing(DeltaError, path): ...``. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unmask.errors import UnmaskError

Form = Callable[[Any, str], Any]

MOST_VALUES = 2_000_000
"""The most values that one JSON text may have. A value of two bytes in the file can cost 100 bytes of memory."""
MOST_BYTES = 256 * 2**20
"""The longest JSON or YAML text that is read."""
DEEPEST = 64
"""The deepest nesting that is read."""
_LARGEST = 2**63  # Whole numbers must be below it.


class Malformed(ValueError):
    """Says that a value has another form than expected. Its text names the value and the form."""


@contextlib.contextmanager
def refusing(error: type[UnmaskError], source: str, advice: str = "") -> Iterator[None]:
    """Turns `Malformed` into an error of unmask whose message names the source, and ends with the advice.

    Example:
        >>> from unmask.errors import DataError
        >>> with refusing(DataError, "'a.json'", "Take another copy."):
        ...     count(-1, "step")
        Traceback (most recent call last):
        unmask.errors.DataError: 'a.json' cannot be used: step = -1 must be a whole number from 0. Take another copy.
    """
    try:
        yield
    except Malformed as malformed:
        raise error(f"{source} cannot be used: {malformed}. {advice}".rstrip()) from malformed


def parse_json(
    text: str | bytes, most_bytes: int = MOST_BYTES, most_values: int = MOST_VALUES, large: bool = False
) -> Any:
    """Parses a JSON text whose size, depth and numbers are within bounds; ``large`` accepts numbers of more than 63 bits.

    Raises:
        Malformed: The text is not JSON in UTF-8, is too large or too deep, or holds a number or character out of bounds.

    Example:
        >>> parse_json('{"a": [1, 2]}')
        {'a': [1, 2]}
    """
    if len(text) > most_bytes:
        raise Malformed(f"it has {len(text):,} bytes of JSON; at most {most_bytes:,} are read")
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    held = sum(data.count(sign) for sign in (b"[", b"{", b","))
    if held > most_values:
        raise Malformed(f"it has about {held:,} values; at most {most_values:,} are read")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise Malformed(f"it is nested deeper than {DEEPEST} levels") from error
    except ValueError as error:  # Also for text that is not UTF-8, and for a whole number of thousands of digits.
        raise Malformed(f"it is no JSON ({error})") from error
    return bounded(value, 2 * most_values, large)


def read_json(path: Path) -> Any:
    """Reads a JSON file with `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Reads a file as bytes.

    Raises:
        Malformed: The file cannot be read, or it is larger than `MOST_BYTES`.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise Malformed(f"it has {size:,} bytes; at most {MOST_BYTES:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise Malformed(f"it cannot be read ({error.strerror or error})") from error


def read_text(path: Path) -> str:
    """Reads a file as text in UTF-8.

    Raises:
        Malformed: The file cannot be read, is larger than `MOST_BYTES`, or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"it is not UTF-8 ({error})") from error


def bounded(value: Any, most: int = 2 * MOST_VALUES, large: bool = False) -> Any:
    """Returns a value of mappings, lists and plain values if its depth and size, its numbers and characters are within bounds.

    It may hold ``most`` values; one that a file repeats by reference (an alias in YAML) counts each time. ``large`` accepts
    whole numbers of more than 63 bits.

    Raises:
        Malformed: The value is out of bounds.
    """
    level, held = [value], 1
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, Mapping):
                inner.extend(each)
                inner.extend(each.values())
            elif isinstance(each, list | tuple | set):
                inner.extend(each)
            elif isinstance(each, str) and not each.isascii():
                try:
                    each.encode()
                except UnicodeEncodeError as error:
                    raise Malformed("it has half a character (a lone surrogate)") from error
            elif not large and isinstance(each, int) and not -_LARGEST <= each < _LARGEST:
                raise Malformed("it has a whole number of more than 63 bits")
            if held + len(inner) > most:
                raise Malformed(f"it has more than {most:,} values")
        if not inner:
            return value
        level, held = inner, held + len(inner)
    raise Malformed(f"it is nested deeper than {DEEPEST} levels")


def shown(value: Any) -> str:
    """Returns a value as an error message shows it, cut to 80 characters."""
    try:
        words = repr(value)
    except Exception:  # A value's own ``__repr__`` may fail.
        words = f"a {type(value).__name__}"
    return words if len(words) <= 80 else f"{words[:77]}..."


def choices(given: Any, names: Iterable[str]) -> str:
    """Lists the names that are allowed, for an error, and says which one is nearest to what was given.

    Example:
        >>> choices("id4", ["id3", "pafi"]), choices("x", ["id3", "pafi"])
        ("id3, pafi (did you mean 'id3'?)", 'id3, pafi')
    """
    names = list(names)
    return ", ".join(names) + nearest(given, names)


def nearest(given: Any, names: Iterable[str]) -> str:
    """Returns, for an error, the name that is nearest to what was given; nothing if none is near.

    Example:
        >>> nearest("id4", ["id3", "pafi"]), nearest("x", ["id3", "pafi"])
        (" (did you mean 'id3'?)", '')
    """
    near = difflib.get_close_matches(given, list(names), 1) if isinstance(given, str) and len(given) < 100 else []
    return f" (did you mean {near[0]!r}?)" if near else ""


# Forms. Each returns the value, or raises Malformed.


def plain(value: Any, where: str) -> Any:
    """Accepts any value."""
    return value


def _form(accepts: Callable[[Any], bool], wanted: str) -> Form:
    """Makes a form that accepts some values; the message says which are ``wanted``."""

    def form(value: Any, where: str) -> Any:
        if not accepts(value):
            raise Malformed(f"{where} = {shown(value)} must be {wanted}")
        return value

    return form


text = _form(lambda value: isinstance(value, str), "a text")
flag = _form(lambda value: isinstance(value, bool), "true or false")
count = _form(
    lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST,
    "a whole number from 0",
)
integer = _form(
    lambda value: isinstance(value, int) and not isinstance(value, bool) and -_LARGEST <= value < _LARGEST,
    "a whole number",
)
scalar = _form(lambda value: value is None or isinstance(value, str | int | float), "a text or a number")


def number(value: Any, where: str) -> float:
    """Accepts a number that fits into a float, NaN and infinity included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed(f"{where} = {shown(value)} must be a number")
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise Malformed(f"{where} = {shown(value)} is too large")
    return value


def finite(value: Any, where: str) -> float:
    """Accepts a number that is neither NaN nor infinite."""
    if not math.isfinite(number(value, where)):
        raise Malformed(f"{where} = {value} must be finite")
    return value


def one_of(*words: Any) -> Form:
    """Makes a form that accepts some values, of exactly their type."""
    wanted = " or ".join(map(str, words))
    return _form(lambda value: any(type(value) is type(word) and value == word for word in words), wanted)


def optional(inner: Form) -> Form:
    """Makes a form that accepts null too."""
    return lambda value, where: None if value is None else inner(value, where)


def items(inner: Form) -> Form:
    """Makes a form that accepts a list whose elements have one form."""

    def form(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise Malformed(f"{where} = {shown(value)} must be a list")
        for place, each in enumerate(value):
            inner(each, f"{where}[{place}]")
        return list(value)

    return form


def mapping(inner: Form) -> Form:
    """Makes a form that accepts a mapping from texts to values of one form."""

    def form(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Malformed(f"{where} = {shown(value)} must be a mapping")
        for key, each in value.items():
            inner(each, f"{where}.{text(key, f'a key of {where}')}")
        return dict(value)

    return form


def fields(needed: Mapping[str, Form], further: Mapping[str, Form] | None = None, closed: bool = False) -> Form:
    """Makes a form that accepts a mapping with entries that must be there, and ``further`` ones that may be there.

    A closed form refuses any other entry.

    Example:
        >>> fields({"step": count}, {"loss": number})({"step": 3, "name": "a"}, "the row")
        {'step': 3, 'name': 'a'}
    """
    forms = {**needed, **(further or {})}

    def form(value: Any, where: str) -> dict[str, Any]:
        found = mapping(plain)(value, where)
        lacking = [key for key in needed if key not in found]
        if lacking:
            raise Malformed(f"{where} lacks {', '.join(lacking)}")
        unknown = [key for key in found if key not in forms]
        if closed and unknown:
            raise Malformed(f"{where} has an unknown entry {shown(unknown[0])}")
        for key in forms.keys() & found.keys():
            forms[key](found[key], f"{where}.{key}")
        return found

    return form
