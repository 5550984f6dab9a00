"""Keeps the outputs of a long evaluation in a jsonl file that stays usable if the process is killed at any moment."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError, DataError
from unmask.files import write_bytes, write_json
from unmask.reading import Malformed, count, fields, items, parse_json, read_json, refusing

SETTINGS = "settings.json"
_ROW = fields({"row": count, "batch": items(count)})


class OutputFile:
    """A file of rows by number, which is extended a batch at a time.

    A batch is written at once, and each of its rows holds the batch's size. So a batch that a kill cut short is recognised,
    and is generated again as a whole: in the same batch, a row is the same as in an uninterrupted run, to the last bit. The
    file need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, dict[str, Any]]:
        """Reads the rows of whole batches, by their ``"row"``.

        A last line that was cut short and a batch that is not whole are removed from the file.

        Raises:
            DataError: A line before the last is not a row that this class has written.
        """
        if not self.path.is_file():
            return {}
        *lines, torn = self.path.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, 1):
            where = f"{self.path}, line {number} is not a row of an evaluation: it"
            with refusing(DataError, where, "Delete the line, or the file."):
                if line.strip():
                    rows.append(dict(_ROW(parse_json(line), "the row")))
                    if len(rows[-1]["batch"]) != 2:
                        raise Malformed("the row's batch must have two numbers")
        sizes = Counter(tuple(row["batch"]) for row in rows)
        whole = [row for row in rows if sizes[tuple(row["batch"])] == row["batch"][1]]
        if torn.strip() or len(whole) < len(rows):
            write_bytes(self.path, _lines(whole))
        return {row["row"]: row for row in whole}

    def append(self, batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Adds the rows of one batch, each with its number as ``"row"``; returns the rows as they are in the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**row, "batch": [batch[0]["row"], len(batch)]} for row in batch]
        with self.path.open("ab") as file:
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())
        return rows

    def rewrite(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Replaces the file by all rows, in order. A kill leaves either the old file or the new one."""
        write_bytes(self.path, _lines([rows[row] for row in sorted(rows)]))


def claim(folder: Path, settings: Mapping[str, Any], files: Iterable[str], overwrite: bool = False) -> None:
    """Reserves a folder for one evaluation by writing the evaluation's settings there.

    If ``overwrite`` is True, the ``files`` that an evaluation may leave there are deleted, also those of another one.

    Raises:
        ConfigError: The folder holds the outputs of another evaluation.
    """
    path, wanted = folder / SETTINGS, json.loads(json.dumps(dict(settings)))
    held = _held(path)
    if overwrite:
        for name in files:
            (folder / name).unlink(missing_ok=True)
    elif held is not None and held != wanted:
        key = next(key for key in sorted({*held, *wanted}) if held.get(key) != wanted.get(key))
        raise ConfigError(
            f"{str(folder)!r} holds the outputs of another evaluation ({key} was {held.get(key)!r}, and is {wanted.get(key)!r}); "
            "give another --output, or --overwrite."
        )
    write_json(path, wanted, indent=2)


def is_of(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Returns True if a folder belongs to the evaluation with these settings, or to none yet."""
    return _held(folder / SETTINGS) in (None, json.loads(json.dumps(dict(settings))))


def _held(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with refusing(DataError, repr(str(path)), "Delete it, or give another --output."):
        return dict(fields({})(read_json(path), "the settings"))


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
