"""The GLUE tasks (arXiv 1804.07461), from folders or from the Hugging Face hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import DataError, need
from unmask.tasks.data import Examples, TaskData, TaskSpec, examples

_HUB = "nyu-mll/glue"
_NLI2 = ("entailment", "not_entailment")
_NLI3 = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")


@dataclass(frozen=True)
class _Source:
    """Where a task's columns stand: each a name to look for, first hit wins; headerless files by column number."""

    folder: str
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    headerless: Mapping[str, int] | None = None
    evals: tuple[str, ...] = ("dev",)
    hub_evals: tuple[str, ...] = ("validation",)


def _spec(name: str, columns: tuple[str, ...], labels: tuple[str, ...] | None, metrics: tuple[str, ...]) -> TaskSpec:
    return TaskSpec(
        name, columns, len(labels) if labels else 1, labels, metrics, metrics[-1] if not labels else metrics[0]
    )


GLUE: Mapping[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        _spec("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        _spec("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        _spec("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        _spec("rte", _PAIR, _NLI2, ("accuracy",)),
        _spec("stsb", _PAIR, None, ("pearson", "spearman", "pearson_spearman")),
        _spec("qnli", ("question", "sentence"), _NLI2, ("accuracy",)),
        _spec("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        _spec("mnli", ("premise", "hypothesis"), _NLI3, ("accuracy",)),
    )
}

_TWO = (("sentence1", "#1 String", "text_a"), ("sentence2", "#2 String", "text_b"))
_SOURCES = {
    "cola": _Source("CoLA", (("sentence",),), ("label",), headerless={"label": 1, "sentence": 3}),
    "sst2": _Source("SST-2", (("sentence",),), ("label",)),
    "mrpc": _Source("MRPC", _TWO, ("label", "Quality")),
    "rte": _Source("RTE", _TWO, ("label",)),
    "stsb": _Source("STS-B", _TWO, ("label", "score")),
    "qnli": _Source("QNLI", (("question", "text_a"), ("sentence", "text_b")), ("label",)),
    "qqp": _Source("QQP", (("question1", "text_a"), ("question2", "text_b")), ("label", "is_duplicate")),
    "mnli": _Source(
        "MNLI",
        (("premise", "sentence1", "text_a"), ("hypothesis", "sentence2", "text_b")),
        ("label", "gold_label"),
        evals=("dev_matched", "dev_mismatched", "dev"),
        hub_evals=("validation_matched", "validation_mismatched"),
    ),
}


def load_glue(name: str, data_dir: str | Path | None = None) -> TaskData:
    """Loads a GLUE task's training and development splits.

    Args:
        name: cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb.
        data_dir: The folder that holds the tasks' folders (``CoLA``, ``SST-2``, ...), or the task's own: ``train.tsv`` and
            ``dev.tsv`` (``dev_matched.tsv`` and ``dev_mismatched.tsv`` for MNLI), or ``.json`` files of
            ``{"0": {"text_a", "text_b", "label"}}``. None: the Hugging Face hub.

    Raises:
        DataError: An unknown task, a missing folder or file, or a bad row.
    """
    if name not in GLUE:
        raise DataError(f"unknown GLUE task {name!r}; there are {', '.join(sorted(GLUE))}.")
    spec, source = GLUE[name], _SOURCES[name]
    if data_dir is None:
        return _from_hub(spec, source)
    folder = _folder(Path(data_dir), source.folder)
    train = _examples(spec, source, _split(folder, "train"))
    evals = {n: _examples(spec, source, _split(folder, n)) for n in source.evals if _find(folder, n)}
    if not evals:
        raise DataError(f"{str(folder)!r} has no {source.evals[0]}.tsv (or .json); it holds {_listing(folder)}.")
    return TaskData(spec, train, evals)


def _folder(given: Path, name: str) -> Path:
    if not given.is_dir():
        raise DataError(f"there is no data folder {str(given)!r}.")
    if (given / name).is_dir():
        return given / name
    if _find(given, "train"):
        return given
    raise DataError(f"{str(given)!r} has neither a folder {name!r} nor train.tsv; it holds {_listing(given)}.")


def _listing(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:20]) or "nothing"


def _find(folder: Path, split: str) -> Path | None:
    return next((p for p in (folder / f"{split}.tsv", folder / f"{split}.json") if p.is_file()), None)


def _split(folder: Path, split: str) -> Path:
    path = _find(folder, split)
    if path is None:
        raise DataError(f"{str(folder)!r} has no {split}.tsv (or .json); it holds {_listing(folder)}.")
    return path


def _examples(spec: TaskSpec, source: _Source, path: Path) -> Examples:
    rows = _read_json(path) if path.suffix == ".json" else _read_tsv(path, source.headerless)
    if not rows:
        raise DataError(f"{str(path)!r} holds no examples.")
    columns = [_pick(rows[0], names, path) for names in source.texts]
    return examples(spec, rows, columns, _pick(rows[0], source.label, path), str(path))


def _pick(row: Mapping[str, Any], names: tuple[str, ...], path: Path) -> str:
    for name in names:
        if name in row:
            return name
    raise DataError(f"{str(path)!r} has no column {' or '.join(map(repr, names))}; its columns are {', '.join(row)}.")


def _read_tsv(path: Path, headerless: Mapping[str, int] | None) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if headerless is None:
        header, lines = (lines[0], lines[1:]) if lines else ([], [])
        wanted = {name: column for column, name in enumerate(header)}
        least = len(header)
    else:
        wanted, least = dict(headerless), 1 + max(headerless.values())
    for number, line in enumerate(lines, 1 if headerless else 2):
        if line and len(line) < least:
            raise DataError(f"{str(path)!r}, line {number}: {len(line)} columns where {least} are needed.")
    return [{name: line[column] for name, column in wanted.items()} for line in lines if line]


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{str(path)!r} is no valid JSON: {error}.") from error
    return list(loaded.values()) if isinstance(loaded, dict) else list(loaded)


def _from_hub(spec: TaskSpec, source: _Source) -> TaskData:
    datasets = need("datasets", "hf")
    try:
        loaded = datasets.load_dataset(_HUB, spec.name)
    except Exception as error:  # datasets raises many kinds: offline, not found, broken cache
        raise DataError(
            f"{_HUB}/{spec.name} cannot be loaded from the hub ({type(error).__name__}: {error}); without a network give the "
            "folder of the task's files as data_dir."
        ) from error

    def split(name: str) -> Examples:
        rows = loaded[name]
        columns = [_pick(rows[0], names, Path(name)) for names in source.texts]
        return examples(spec, list(rows), columns, "label", f"{_HUB}/{spec.name}:{name}")

    return TaskData(spec, split("train"), {name: split(name) for name in source.hub_evals})
