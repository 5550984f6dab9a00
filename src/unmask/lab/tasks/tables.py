"""Reads csv, tsv, json and jsonl files (each also gzipped) and parquet files into columns that know each row's place."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import sys
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from unmask.errors import DataError, need
from unmask.reading import Malformed, nearest, parse_json, shown

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_MOST_LISTED, _LONGEST_LISTED = 20, 80
_Row = tuple[int, Sequence[str]]  # the line's number, from 1, and its cells


@dataclass(frozen=True)
class TextFormat:
    """The way in which a user's csv and tsv files are written, where that is not the usual one.

    Attributes:
        delimiter: The character between two cells, ``"\\t"`` or ``"tab"`` for a tab. None takes the tab in a tsv file, and in
            a csv file the comma, or else the semicolon or the tab, whichever the first line has.
        encoding: The encoding of text files, a name that Python knows. A byte-order mark of UTF-8 is passed over.

    Raises:
        DataError: The delimiter is not one character, or there is no such encoding.

    Example:
        >>> TextFormat(delimiter="tab").delimiter
        '\\t'
    """

    delimiter: str | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if self.delimiter in ("tab", "\\t"):
            object.__setattr__(self, "delimiter", "\t")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '\r\n"'):
            raise DataError(f"delimiter = {shown(self.delimiter)}; it must be one character, such as ';', or tab.")
        try:
            usual = codecs.lookup(self.encoding).name == "utf-8"
            io.TextIOWrapper(io.BytesIO(), self.encoding)  # refuses those that are not of text, such as base64
        except (LookupError, ValueError) as error:
            raise DataError(
                f"encoding = {shown(self.encoding)}; Python knows no such encoding. There are utf-8, utf-16, latin-1, cp1252, "
                "gb18030, shift_jis and more."
            ) from error
        if usual:
            object.__setattr__(self, "encoding", "utf-8-sig")


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        source: The origin, as errors name it.
        columns: The values by column name.
        places: The number of each row in the source, from 1.
        unit: The unit that `places` count: ``"line"`` for a text file, else ``"row"``.
        skipped: The number of broken rows that were left out, where the caller allowed that.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[int]
    unit: str = "row"
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.places)

    def where(self, row: int) -> str:
        """Returns the place of a row (counted from 0), for errors.

        Example:
            >>> Table("a.tsv", {"x": ["u"]}, [2], "line").where(0)
            'a.tsv, line 2'
        """
        return f"{self.source}, {self.unit} {self.places[row]}"

    def column(self, name: str) -> Sequence[Any]:
        """Returns the values of a column.

        Raises:
            DataError: The table has no column of that name.
        """
        if name not in self.columns:
            raise unknown_column(self.source, name, self.columns)
        return self.columns[name]


def unknown_column(source: str, name: str, columns: Iterable[str]) -> DataError:
    """Makes the error for a column that is missing."""
    names = list(columns)
    return DataError(f"{source} has no column {name!r}; its columns are {listed(names)}{nearest(name, names)}.")


def listed(names: Iterable[str], most: int = _MOST_LISTED) -> str:
    """Joins names for an error: only the first ones, and each cut to a line.

    Example:
        >>> listed(["a", "b" * 100, "c"], most=2)
        'a, bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb... and 1 more'
    """
    names = list(names)
    cut = [name if len(name) <= _LONGEST_LISTED else f"{name[: _LONGEST_LISTED - 3]}..." for name in names[:most]]
    return ", ".join(cut) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextlib.contextmanager
def placed(where: object) -> Iterator[None]:
    """Puts a place (a file, or a row of a file) before the message of a `DataError`.

    Example:
        >>> with placed("a.csv"):
        ...     raise DataError("it has only one row.")
        Traceback (most recent call last):
        unmask.errors.DataError: a.csv: it has only one row.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def listing(folder: Path) -> str:
    """Lists the names in a folder, for errors."""
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r} either"
    return f"{str(folder)!r} holds {listed(sorted(path.name for path in folder.iterdir())) or 'nothing'}"


def suffix_of(path: Path) -> str:
    """Returns the suffix that tells the format, in lower case and without ``.gz``.

    Example:
        >>> suffix_of(Path("train.TSV.gz"))
        '.tsv'
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def plain_name(name: str) -> str:
    """Returns a folder's name in the spelling of the tasks' names.

    Example:
        >>> [plain_name(name) for name in ("SST-2", "wnut_17", "Math 10K")]
        ['sst2', 'wnut17', 'math10k']
    """
    return name.lower().translate({ord(sign): None for sign in "-_ "})


def task_files(
    given: Path, name: str, tasks: Container[str], stems: Mapping[str, Sequence[str]], suffixes: Sequence[str]
) -> tuple[Path, dict[str, Path]]:
    """Finds the folder of a task, and the file of each split in it.

    The folder is the one in the given folder that has the task's name, or the given folder itself. The file's name is one of
    the split's ``stems`` with one of the suffixes, and with ``.gz`` if it is gzipped.

    Raises:
        DataError: There is no such folder, the given one is that of another of the ``tasks``, or there are two folders for
            the task or two files for a split.
    """
    if not given.is_dir():
        raise DataError(f"there is no data folder {str(given)!r}; {listing(given.parent)}.")
    inside = [path for path in sorted(given.iterdir()) if path.is_dir() and plain_name(path.resolve().name) == name]
    if len(inside) > 1:
        raise DataError(f"{str(given)!r} holds more than one folder for {name}: {inside[0].name}, {inside[1].name}.")
    other = plain_name(given.resolve().name)
    if not inside and other in tasks and other != name:  # many tasks share one format, so it would load silently
        raise DataError(f"{str(given)!r} is the folder of {other}, not of {name}.")
    folder, found = inside[0] if inside else given, {}
    for split, names in stems.items():
        paths = (folder / "".join(parts) for parts in itertools.product(names, suffixes, ("", ".gz")))
        there = [path for path in paths if path.is_file()]
        if len(there) > 1:
            raise DataError(f"{str(folder)!r} holds both {there[0].name} and {there[1].name}; leave one.")
        if there:
            found[split] = there[0]
    return folder, found


def read_table(
    path: Path, header: tuple[str, ...] | None = None, skip_short: bool = False, form: TextFormat | None = None
) -> Table:
    """Reads a file in the format that its suffix names.

    csv is read with quotes, and tsv without, as GLUE's files are written. Blank lines are passed over.

    Args:
        path: A file whose name ends in one of `SUFFIXES`. A text file may also end in ``.gz``.
        header: The column names of a csv or tsv file that has no header line. A first line that holds two of these
            names or more (or the only one) is read as a header line nevertheless.
        skip_short: Leaves out csv and tsv rows with too few cells, and counts them in `Table.skipped`.
        form: How a csv or tsv file is written; None for the usual way.

    Raises:
        DataError: The file is missing, damaged, empty or of an unknown format, or a row is wider or narrower than the
            header.
    """
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}; {listing(path.parent)}.")
    suffix, source = suffix_of(path), str(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{source!r} has an unknown format; its name must end in {', '.join(SUFFIXES)}.")
    form = form or TextFormat()
    if form.delimiter is not None and suffix not in (".csv", ".tsv"):
        raise DataError(
            f"delimiter = {form.delimiter!r}, and {source!r} is no csv or tsv file; leave the delimiter out."
        )
    if suffix == ".parquet":
        table = _read_parquet(path)
    else:
        with open_text(path, suffix[1:], "" if suffix == ".csv" else "\n", form.encoding) as file:
            if suffix in (".json", ".jsonl"):
                table = _read_records(file, source, by_line=suffix == ".jsonl")
            else:
                read = _csv_rows if suffix == ".csv" else _tsv_rows
                table = _read_cells(source, read(file, source, form.delimiter), header, skip_short)
    if not table.places:
        raise DataError(f"{source!r} is empty: it holds no examples.")
    return table


@contextlib.contextmanager
def open_text(path: Path, form: str, newline: str = "\n", encoding: str = "utf-8-sig") -> Iterator[TextIO]:
    """Opens a text file, which may be gzipped.

    By the encoding utf-8-sig a byte-order mark does not become part of the first column's name. A newline of "\\n" keeps the
    other characters that Unicode counts as line ends in the text.

    Raises:
        DataError: The file has another encoding, is a damaged gzip, or a reader finds that it is not of the named form.
    """
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding=encoding, newline=newline) as file:
            yield file
    except DataError:
        raise
    except UnicodeError as error:
        name = "UTF-8" if encoding == "utf-8-sig" else encoding
        raise DataError(
            f"{str(path)!r} cannot be read as {form} (in {name}): {error}. Save it in UTF-8, or, for texts of your own, name its "
            "encoding (--encoding latin-1)."
        ) from error
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read as {form}: {error}") from error


def _read_parquet(path: Path) -> Table:
    parquet = need("pyarrow.parquet", "hf")
    try:
        columns = parquet.read_table(path).to_pydict()
    except Exception as error:  # pyarrow raises many classes, and each of them means that the file is damaged
        raise DataError(f"{str(path)!r} cannot be read as parquet: {shown(str(error))}") from error
    return Table(str(path), columns, range(1, len(next(iter(columns.values()), [])) + 1))


def _tsv_rows(file: TextIO, _: str, delimiter: str | None) -> Iterator[_Row]:
    for number, line in enumerate(file, 1):
        line = line.removesuffix("\n").removesuffix("\r")
        if line:
            yield number, line.split(delimiter or "\t")


def _csv_rows(file: TextIO, source: str, delimiter: str | None) -> Iterator[_Row]:
    if delimiter is None:  # the first of these that divides the first line
        first = file.readline().rstrip("\r\n")
        file.seek(0)
        cells = {sign: next(csv.reader([first], delimiter=sign), []) for sign in ",;\t"}
        delimiter = next((sign for sign, found in cells.items() if len(found) > 1), ",")
    reader = csv.reader(file, strict=True, delimiter=delimiter)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.line_num}: {error}; mend the quotes there.") from error


def _read_cells(source: str, rows: Iterator[_Row], header: tuple[str, ...] | None, skip_short: bool) -> Table:
    first = next(rows, None)
    if first is None:
        return Table(source, {}, ())
    has_header = header is None or len(set(header) & set(first[1])) >= min(2, len(header))
    names = tuple(first[1]) if has_header or header is None else header
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source}: column {shown(twice)} is there more than once; rename one of them.")
    kept, places, skipped = [], [], 0
    for number, cells in rows if has_header else itertools.chain([first], rows):
        if len(cells) < len(names) and skip_short:
            skipped += 1
            continue
        if len(cells) != len(names):
            quotes = " tsv is read without quotes; save it as csv if cells are quoted." * (".tsv" in source.lower())
            raise DataError(
                f"{source}, line {number} has {len(cells)} columns where {len(names)} are needed "
                f"({listed(map(repr, names))}). Mend or drop the line.{quotes}"
            )
        kept.append(cells)
        places.append(number)
    columns = zip(*kept, strict=True) if kept else [()] * len(names)
    return Table(source, dict(zip(names, columns, strict=True)), places, "line", skipped)


def _read_records(file: TextIO, source: str, by_line: bool) -> Table:
    """Reads a record per line, or else a list of records, or a mapping such as ``{"0": {...}, "1": {...}}``."""
    records: list[tuple[int, Any]] = []
    if by_line:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    records.append((number, parse_json(line, large=True)))
            except Malformed as error:
                why = str(error).removeprefix("it ")
                raise DataError(f"{source}, line {number} {why}. Mend or drop the line.") from error
    else:
        loaded = parse_json(file.read(), sys.maxsize, sys.maxsize, large=True)
        if not isinstance(loaded, list | dict):
            kind = type(loaded).__name__
            raise DataError(f"{source} holds a {kind}; it must be a list of records (or a mapping of them).")
        records.extend(enumerate(loaded.values() if isinstance(loaded, dict) else loaded, 1))
    unit = "line" if by_line else "record"
    for number, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{source}, {unit} {number} is {shown(record)}; it must be a mapping of columns to values.")
    names = dict.fromkeys(name for _, record in records for name in record)
    columns = {name: [record.get(name) for _, record in records] for name in names}
    return Table(source, columns, [number for number, _ in records], unit)
