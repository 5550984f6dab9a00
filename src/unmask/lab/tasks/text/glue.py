"""The GLUE tasks (Wang et al., 2018, arXiv 1804.07461): their table, and loading by name from the hub or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unmask.errors import DataError
from unmask.lab.tasks.hub import HubSource, load_splits, split_table
from unmask.lab.tasks.split import unofficial
from unmask.lab.tasks.text.glue_files import load_folder
from unmask.lab.tasks.text.labels import examples
from unmask.lab.tasks.text.spec import Examples, TaskData, TaskSpec

_HUB = "nyu-mll/glue"
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
    source = HubSource(_HUB, name, texts, evals=evals)
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
        raise DataError(f"unknown GLUE task {name!r}; there are {', '.join(sorted(GLUE))}.")
    spec = GLUE[name]
    if data_dir is not None:
        train, evals, notes = load_folder(spec, Path(data_dir), need_train)
    else:
        hub = spec.hub
        assert hub is not None, "each task of the table is on the hub"
        splits = load_splits(hub.path, hub.config, "give the folder of the task's files with data_dir")

        def split(name: str) -> Examples:
            table = split_table(splits, name, f"{hub.path}:{hub.config}", (*hub.texts, hub.label))
            return examples(spec, table, hub.texts, hub.label, keep_empty=spec.name == "qqp")

        train, evals, notes = split(hub.train), {ours: split(theirs) for theirs, ours in hub.evals}, ()
    return TaskData(spec, train, evals, (*notes, *unofficial(name, "examples", {"train": train, **evals}, spec.sizes)))
