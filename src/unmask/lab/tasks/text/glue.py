"""The GLUE tasks (Wang et al., 2018, arXiv 1804.07461): their table, and loading by name from the hub or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unmask.errors import DataError
from unmask.lab.tasks.hub import HubSource
from unmask.lab.tasks.split import unofficial
from unmask.lab.tasks.tables import SUFFIXES, listed, listing, read_table, suffix_of, task_files
from unmask.lab.tasks.text.labels import examples
from unmask.lab.tasks.text.spec import Examples, TaskData, TaskSpec
from unmask.reading import choices

_TWO = (("sentence1", "#1 String", "text_a"), ("sentence2", "#2 String", "text_b"))
_NLI2 = ("entailment", "not_entailment")
_NLI3 = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_CORRELATIONS = ("pearson_spearman", "pearson", "spearman")
_TWO_DEVS = (("validation_matched", "dev_matched"), ("validation_mismatched", "dev_mismatched"))


def _spec(
    name: str,
    texts: tuple[str, ...],
    labels: tuple[str, ...] | None,
    metrics: tuple[str, ...],
    sizes: tuple[int, ...],
    evals: tuple[tuple[str, str], ...] = (("validation", "dev"),),
) -> TaskSpec:
    """Makes a task whose main metric is the first, with the hub's column names; without labels it has STS-B's range.

    ``sizes`` are the numbers of examples on the hub, those of the training split first.
    """
    source = HubSource("nyu-mll/glue", name, texts, evals=evals)
    count, bounds = (1, (0.0, 5.0)) if labels is None else (len(labels), None)
    official = dict(zip(("train", *(ours for _, ours in evals)), sizes, strict=True))
    return TaskSpec(name, texts, count, labels, metrics, metrics[0], bounds, source, official)


GLUE: Mapping[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        _spec("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), (8_551, 1_043)),
        _spec("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), (67_349, 872)),
        _spec("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), (3_668, 408)),
        _spec("rte", _PAIR, _NLI2, ("accuracy",), (2_490, 277)),
        _spec("stsb", _PAIR, None, _CORRELATIONS, (5_749, 1_500)),
        _spec("qnli", ("question", "sentence"), _NLI2, ("accuracy",), (104_743, 5_463)),
        _spec("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), (363_846, 40_430)),
        _spec("mnli", ("premise", "hypothesis"), _NLI3, ("accuracy",), (392_702, 9_815, 9_832), _TWO_DEVS),
    )
}


@dataclass(frozen=True)
class _Layout:
    """The layout of a task's files. Of several names for a column, the first one that the file has is taken."""

    folder: str  # the official name of the task's folder
    texts: tuple[tuple[str, ...], ...]  # the names of each text's column
    label: tuple[str, ...] = ("label",)
    header: tuple[str, ...] | None = None  # the column names of tsv files that have no header line
    evals: tuple[str, ...] = ("dev",)  # the evaluation files, of which one is enough
    defects: bool = False  # as on the hub, rows that are cut short are left out, and one text of a row may be empty


_LAYOUTS: Mapping[str, _Layout] = {
    "cola": _Layout("CoLA", (("sentence", "text_a"),), header=("source", "label", "mark", "sentence")),
    "sst2": _Layout("SST-2", (("sentence", "text_a"),)),
    "mrpc": _Layout("MRPC", _TWO, ("label", "Quality")),
    "rte": _Layout("RTE", _TWO),
    "stsb": _Layout("STS-B", _TWO, ("label", "score")),
    "qnli": _Layout("QNLI", (("question", "text_a"), ("sentence", "text_b"))),
    "qqp": _Layout("QQP", (("question1", "text_a"), ("question2", "text_b")), ("label", "is_duplicate"), defects=True),
    "mnli": _Layout(
        "MNLI",
        (("premise", "sentence1", "text_a"), ("hypothesis", "sentence2", "text_b")),
        ("label", "gold_label"),
        evals=("dev_matched", "dev_mismatched", "dev"),
    ),
}


def load_glue(name: str, data_dir: str | Path | None = None, *, need_train: bool = True) -> TaskData:
    """Loads a GLUE task's training and development splits.

    Args:
        name: The task: cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb.
        data_dir: The folder that holds the tasks' folders (``CoLA``, ``SST-2``, ...), or the task's own. It has ``train.tsv``
            and ``dev.tsv`` (``dev_matched.tsv`` and ``dev_mismatched.tsv`` for MNLI), or ``.json`` files of
            ``{"0": {"text_a", "text_b", "label"}}``. None means the Hugging Face hub.
        need_train: False is for evaluation: the folder may lack the training file, and the training split is then empty.

    Returns:
        The task, with the evaluation splits ``dev``, or ``dev_matched`` and ``dev_mismatched``. Labels have the hub's ids. A
        note says if a split has not the official number of examples: its score is then not the task's official score.

    Raises:
        DataError: The task is unknown, a folder or file is missing, or a row is bad.
    """
    if name not in GLUE:
        raise DataError(f"unknown GLUE task {name!r}; there are {choices(name, sorted(GLUE))}.")
    spec = GLUE[name]
    splits: dict[str, Examples] = {}
    notes: list[str] = []
    layout = _LAYOUTS[name]
    if data_dir is not None:
        stems = {split: (split,) for split in ("train", *layout.evals)}
        folder, paths = task_files(Path(data_dir), name, _LAYOUTS, stems, SUFFIXES)
        if folder == Path(data_dir) and not paths:
            raise DataError(f"there is neither a folder {layout.folder!r} nor train.tsv: {listing(folder)}.")
        lacking = [] if paths.keys() - {"train"} else [layout.evals[0]]
        lacking += ["train"] if need_train and "train" not in paths else []
        if lacking:
            raise DataError(f"{name} needs {' and '.join(f'{split}.tsv' for split in lacking)}; {listing(folder)}.")
        for split, path in paths.items():
            table = read_table(path, layout.header if suffix_of(path) == ".tsv" else None, skip_short=layout.defects)
            columns = []
            for names in (*layout.texts, layout.label):
                there = [name for name in names if name in table.columns]
                if not there:
                    either = " or ".join(map(repr, names))
                    raise DataError(f"{path} has no column {either}; its columns are {listed(table.columns)}.")
                columns.append(there[0])
            splits[split] = examples(spec, table, columns[:-1], columns[-1], keep_empty=layout.defects)
            if table.skipped:
                notes.append(f"{path.name}: {table.skipped} rows that are cut short are left out, as on the hub")
    else:
        hub = spec.hub
        assert hub is not None, "each task of the table is on the hub"
        for split, table in hub.tables().items():
            splits[split] = examples(spec, table, hub.texts, hub.label, keep_empty=layout.defects)
    notes += unofficial(name, "examples", splits, spec.sizes)
    train = splits.pop("train", Examples([], [] if len(spec.text_columns) > 1 else None, []))
    return TaskData(spec, train, splits, tuple(notes))
