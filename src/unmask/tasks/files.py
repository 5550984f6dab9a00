"""The user's own files, or a data set of the hub, as a task."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.errors import DataError, need
from unmask.tasks.data import Examples, TaskData, TaskSpec, examples

Rows = list[dict[str, Any]]
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_HELD_OUT = 0.1
_MOST_CLASSES = 1000


def load_files(
    train: str, evaluation: str | None, text: str, label: str, text_pair: str | None = None, seed: int = 0
) -> TaskData:
    """Loads a task from files, or from a data set of the Hugging Face hub.

    Whole-number labels are class ids 0 to k - 1, texts are class names (ids in sorted order), and labels with a fraction
    make it a regression.

    Args:
        train: A file (csv, tsv, jsonl, json, parquet), or a hub id (``"user/name"`` or ``"user/name:config"``).
        evaluation: Likewise a file; None: the hub data set's validation or test split, else a tenth of ``train``.
        text: Text column.
        label: Label column.
        text_pair: Second text column.
        seed: Of the held-out tenth.

    Raises:
        DataError: A missing file, an unknown format or column, a bad row, or a label that training has not.
    """
    notes: list[str] = []
    rows, held = _read(train)
    if evaluation is not None:
        held = _read_file(Path(evaluation))
    if held is None:
        rows, held = _hold_out(rows, seed)
        notes.append(
            f"no evaluation data given: {len(held)} of {len(rows) + len(held)} examples are held out (seed {seed})."
        )
    columns = [text] if text_pair is None else [text, text_pair]
    spec = _infer_spec(rows, tuple(columns), label, train)
    split: dict[str, Examples] = {"eval": examples(spec, held, columns, label, evaluation or f"{train} (held out)")}
    return TaskData(spec, examples(spec, rows, columns, label, train), split, tuple(notes))


def load_evaluation(spec: TaskSpec, path: str, text: str, label: str, text_pair: str | None = None) -> Examples:
    """Loads one file of examples for a task that is already defined (by a trained delta, say).

    Raises:
        DataError: A missing file or column, or a label that the task has not.
    """
    columns = [text] if text_pair is None else [text, text_pair]
    return examples(spec, _read_file(Path(path)), columns, label, path)


def _read(source: str) -> tuple[Rows, Rows | None]:
    path = Path(source)
    if path.suffix in _SUFFIXES or path.exists():
        return _read_file(path), None
    return _read_hub(source)


def _read_file(path: Path) -> Rows:
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}.")
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{str(path)!r} has no known format; there are {', '.join(_SUFFIXES)}.")
    try:
        rows = _PARSERS[path.suffix](path)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{str(path)!r} cannot be read as {path.suffix[1:]}: {error}.") from error
    if not rows:
        raise DataError(f"{str(path)!r} holds no examples.")
    return rows


def _read_separated(path: Path) -> Rows:
    tab = path.suffix == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {"strict": True}
        reader = csv.DictReader(file, **options)
        rows = []
        for row in reader:
            if None in row.values() or None in row:
                raise DataError(
                    f"{str(path)!r}, line {reader.line_num}: it has not the {len(reader.fieldnames or ())} columns of the header."
                )
            rows.append(dict(row))
    return rows


def _read_jsonl(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _read_json(path: Path) -> Rows:
    loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    return list(loaded.values()) if isinstance(loaded, dict) else list(loaded)


def _read_parquet(path: Path) -> Rows:
    return list(need("pyarrow.parquet", "hf").read_table(path).to_pylist())


_PARSERS = {
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _read_hub(source: str) -> tuple[Rows, Rows | None]:
    name, _, config = source.partition(":")
    datasets = need("datasets", "hf")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # datasets raises many kinds: offline, not found, broken cache
        raise DataError(
            f"{source!r} is neither a file here ({', '.join(_SUFFIXES)}) nor a data set that the hub gives "
            f"({type(error).__name__}: {error})."
        ) from error
    held = next((loaded[split] for split in ("validation", "test") if split in loaded), None)
    return list(loaded["train"]), None if held is None else list(held)


def _hold_out(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    if len(rows) < 2:
        raise DataError("one example alone cannot be split into training and evaluation data; give an evaluation file.")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = max(1, round(_HELD_OUT * len(rows)))
    held = set(order[:count])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def _infer_spec(rows: Rows, columns: tuple[str, ...], label: str, source: str) -> TaskSpec:
    if label not in rows[0]:
        raise DataError(f"{source} has no column {label!r}; its columns are {', '.join(rows[0])}.")
    values = [row.get(label) for row in rows]
    if any(v is None or str(v).strip() == "" or str(v).strip().lower() == "nan" for v in values):
        at = next(i for i, v in enumerate(values, 1) if v is None or str(v).strip().lower() in ("", "nan"))
        raise DataError(f"{source}, row {at}: column {label!r} is empty; mend or drop the row.")
    numbers = _numbers(values)
    if numbers is None:
        return _classes(source, columns, tuple(sorted({str(v).strip() for v in values})))
    if any(not n.is_integer() for n in numbers):
        return TaskSpec(
            "custom", columns, 1, None, ("pearson", "spearman", "mse", "pearson_spearman"), "pearson_spearman"
        )
    low, high = int(min(numbers)), int(max(numbers))
    if low < 0 or high >= _MOST_CLASSES:
        raise DataError(
            f"{source}: column {label!r} has whole numbers from {low} to {high}; class ids run from 0 to k - 1 (at most "
            f"{_MOST_CLASSES - 1}). For a regression write them with a fraction (3.0 is whole; 3.5 is not) in some row."
        )
    return _classes(source, columns, tuple(str(i) for i in range(high + 1)))


def _numbers(values: Sequence[Any]) -> list[float] | None:
    try:
        numbers = [float(str(v)) for v in values]
    except ValueError:
        return None
    return numbers if all(math.isfinite(n) for n in numbers) else None


def _classes(source: str, columns: tuple[str, ...], names: tuple[str, ...]) -> TaskSpec:
    if len(names) < 2:
        raise DataError(f"{source} has only one class ({names[0]!r}); there is nothing to learn.")
    metrics = ("accuracy", "f1") if len(names) == 2 else ("accuracy",)
    return TaskSpec("custom", columns, len(names), names, metrics, "accuracy")
