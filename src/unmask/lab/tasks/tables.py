"""Reading csv, tsv, json, jsonl (each also gzipped) and parquet into columns that remember where each row stood."""

from __future__ import annotations

import contextlib
import csv
import gzip
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from unmask.errors import DataError, need
from unmask.reading import Malformed, parse_json, shown

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
DAMAGED = (ValueError, OSError, EOFError, zlib.error)
"""What reading a text file raises that is not UTF-8, not in its format, or a gzip that is cut short or damaged."""
_MOST_LISTED, _LONGEST_LISTED = 20, 80
_Row = tuple[int, Sequence[str]]  # line number from 1, cells


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        source: Names the origin in errors.
        columns: Values by column name.
        places: For each row its number in the source, from 1.
        unit: What is counted: ``"line"`` of a text file, else ``"row"``.
        skipped: How many broken rows were left out, where the caller allowed that.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    places: Sequence[int]
    unit: str = "row"
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.places)

    def where(self, row: int) -> str:
        """The place of a row (from 0), for errors.

        Example:
            >>> Table("a.tsv", {"x": ["u"]}, [2], "line").where(0)
            'a.tsv, line 2'
        """
        return f"{self.source}, {self.unit} {self.places[row]}"

    def column(self, name: str) -> Sequence[Any]:
        """The values of a column.

        Raises:
            DataError: There is none of that name.
        """
        if name not in self.columns:
            raise unknown_column(self.source, name, self.columns)
        return self.columns[name]


def unknown_column(source: str, name: str, columns: Iterable[str]) -> DataError:
    """The error for a column that is not there."""
    return DataError(f"{source} has no column {name!r}; its columns are {listed(columns)}.")


def listed(names: Iterable[str], most: int = _MOST_LISTED) -> str:
    """Names in a row, for errors: the first ones, and each cut to a line.

    Example:
        >>> listed(["a", "b" * 100, "c"], most=2)
        'a, bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb... and 1 more'
    """
    names = list(names)
    cut = [name if len(name) <= _LONGEST_LISTED else f"{name[: _LONGEST_LISTED - 3]}..." for name in names[:most]]
    return ", ".join(cut) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextlib.contextmanager
def placed(where: object) -> Iterator[None]:
    """Puts a place (a file, or a row of one) before the message of a `DataError`.

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
    """The names in a folder, for errors."""
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r} either"
    return f"{str(folder)!r} holds {listed(sorted(path.name for path in folder.iterdir())) or 'nothing'}"


def suffix_of(path: Path) -> str:
    """The format's suffix, in lower case and without ``.gz``.

    Example:
        >>> suffix_of(Path("train.TSV.gz"))
        '.tsv'
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_table(path: Path, header: tuple[str, ...] | None = None, skip_short: bool = False) -> Table:
    """Reads a file by its suffix.

    csv is read with quotes; tsv without, as GLUE's files are written. Blank lines are passed over.

    Args:
        path: A file ending in one of `SUFFIXES`, the text formats also in ``.gz``.
        header: Column names of a csv or tsv file that has no header line. A first line that holds two of these names
            or more (or the only one) is taken for a header line nevertheless.
        skip_short: Leave out csv and tsv rows with too few cells, and count them in `Table.skipped`.

    Raises:
        DataError: No such file, unknown format, damaged or empty file, or a row of another width than the header.
    """
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}; {listing(path.parent)}.")
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise DataError(f"{str(path)!r} is of no known format; its name must end in {', '.join(SUFFIXES)}.")
    try:
        table = _parse(path, suffix, header, skip_short)
    except DataError:
        raise
    except DAMAGED as error:
        raise DataError(f"{str(path)!r} cannot be read as {suffix[1:]} (in UTF-8): {error}") from error
    if not table.places:
        raise DataError(f"{str(path)!r} is empty: it holds no examples.")
    return table


def _parse(path: Path, suffix: str, header: tuple[str, ...] | None, skip_short: bool) -> Table:
    if suffix == ".parquet":
        columns = _read_parquet(path)
        rows = len(next(iter(columns.values()), []))
        return Table(str(path), columns, range(1, rows + 1))
    if suffix in (".csv", ".tsv"):
        with open_text(path, newline="" if suffix == ".csv" else "\n") as file:
            cells = _csv_rows(file, str(path)) if suffix == ".csv" else _tsv_rows(file)
            return _from_cells(str(path), cells, header, skip_short)
    with open_text(path, newline="\n") as file:
        read: Callable[[TextIO, str], Table] = _read_json if suffix == ".json" else _read_jsonl
        return read(file, str(path))


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    parquet = need("pyarrow.parquet", "hf")
    try:
        return parquet.read_table(path).to_pydict()
    except Exception as error:  # of the library, of many classes, and always of the file
        raise DataError(f"{str(path)!r} cannot be read as parquet: {shown(str(error))}") from error


def open_text(path: Path, newline: str) -> TextIO:
    """Opens a text file, gzipped or not.

    utf-8-sig, for a byte-order mark must not become part of the first column's name.
    newline="\\n": other characters that Unicode counts as line ends are part of the text.
    """
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _tsv_rows(file: TextIO) -> Iterator[_Row]:
    for number, line in enumerate(file, 1):
        line = line.removesuffix("\n").removesuffix("\r")
        if line:
            yield number, line.split("\t")


def _csv_rows(file: TextIO, source: str) -> Iterator[_Row]:
    reader = csv.reader(file, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.line_num}: {error}; mend the quotes there.") from error


def _from_cells(source: str, rows: Iterator[_Row], header: tuple[str, ...] | None, skip_short: bool) -> Table:
    first = next(rows, None)
    if first is None:
        return Table(source, {}, ())
    has_header = header is None or len(set(header) & set(first[1])) >= min(2, len(header))
    names = tuple(first[1]) if has_header or header is None else header
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source}: column {shown(twice)} is there more than once; rename one of them.")
    kept, places, skipped = [], [], 0
    for number, cells in rows if has_header else _chain(first, rows):
        if len(cells) < len(names) and skip_short:
            skipped += 1
            continue
        if len(cells) != len(names):
            raise _wrong_width(source, number, len(cells), names)
        kept.append(cells)
        places.append(number)
    columns = zip(*kept, strict=True) if kept else [()] * len(names)
    return Table(source, dict(zip(names, columns, strict=True)), places, "line", skipped)


def _chain(first: _Row, rows: Iterator[_Row]) -> Iterator[_Row]:
    yield first
    yield from rows


def _wrong_width(source: str, number: int, found: int, names: tuple[str, ...]) -> DataError:
    hint = " tsv is read without quotes; save it as csv if cells are quoted." if ".tsv" in source.lower() else ""
    return DataError(
        f"{source}, line {number} has {found} columns where {len(names)} are needed ({listed(map(repr, names))})."
        f" Mend or drop the line.{hint}"
    )


def _read_jsonl(file: TextIO, source: str) -> Table:
    records = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            records.append((number, parse_json(line, large=True)))
        except Malformed as error:
            why = str(error).removeprefix("it ")
            raise DataError(f"{source}, line {number} {why}. Mend or drop the line.") from error
    return _from_records(source, records, "line")


def _read_json(file: TextIO, source: str) -> Table:
    """A list of records, or a mapping of keys to records as ``{"0": {...}, "1": {...}}``."""
    loaded = parse_json(file.read(), sys.maxsize, sys.maxsize, large=True)
    if not isinstance(loaded, list | dict):
        raise DataError(
            f"{source} holds a {type(loaded).__name__}; it must be a list of records (or a mapping of them)."
        )
    records = loaded.values() if isinstance(loaded, dict) else loaded
    return _from_records(source, list(enumerate(records, 1)), "record")


def _from_records(source: str, records: Sequence[tuple[int, Any]], unit: str) -> Table:
    for number, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{source}, {unit} {number} is {shown(record)}; it must be a mapping of columns to values.")
    names = dict.fromkeys(name for _, record in records for name in record)
    columns = {name: [record.get(name) for _, record in records] for name in names}
    return Table(source, columns, [number for number, _ in records], unit)
