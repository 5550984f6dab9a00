"""Loading tasks from files of every layout, refusing bad ones, and scoring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from unmask.errors import DataError
from unmask.tasks import GLUE, TaskSpec, compute, load_evaluation, load_files, load_glue

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return folder


LAYOUTS = {
    "cola": ("CoLA", "gj04\t1\t\tIt works.\ngj04\t0\t*\tWorks it.\n", [1, 0], "It works."),
    "sst2": ("SST-2", 'sentence\tlabel\na "quoted" start \t1\nbad\t0\n', [1, 0], 'a "quoted" start '),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\tA b.\tA c.\n0\t7\t8\tD.\tE.\n",
        [1, 0],
        "A b.",
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tC.\tD.\tentailment\n",
        [1, 0],
        "A.",
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel\n0\tQ?\tS.\tentailment\n1\tR?\tT.\tnot_entailment\n",
        [0, 1],
        "Q?",
    ),
    "stsb": ("STS-B", "index\tsentence1\tsentence2\tscore\n0\tA.\tB.\t4.750\n1\tC.\tD.\t0\n", [4.75, 0.0], "A."),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tA?\tB?\t1\n1\t3\t4\tC?\tD?\t0\n",
        [1, 0],
        "A?",
    ),
}


@pytest.mark.parametrize("task", LAYOUTS)
def test_glue_folders_give_the_official_ids(task: str, tmp_path: Path) -> None:
    folder, text, labels, first = LAYOUTS[task]
    write(tmp_path / folder, {"train.tsv": text, "dev.tsv": text})
    for given in (tmp_path, tmp_path / folder):
        data = load_glue(task, given)
        assert data.train.labels == data.evals["dev"].labels == labels
        assert data.train.texts[0] == first
        assert (data.train.pairs is None) == (len(data.spec.text_columns) == 1)


def test_mnli_has_two_evaluation_splits_and_json_samples_load(tmp_path: Path) -> None:
    row = "sentence1\tsentence2\tgold_label\nA.\tB.\tcontradiction\n"
    write(tmp_path / "tsv", {"train.tsv": row, "dev_matched.tsv": row, "dev_mismatched.tsv": row})
    data = load_glue("mnli", tmp_path / "tsv")
    assert list(data.evals) == ["dev_matched", "dev_mismatched"]
    assert data.train.labels == [2]
    sample = json.dumps({"0": {"text_a": "A.", "text_b": "B.", "label": "neutral"}})
    write(tmp_path / "MNLI", {"train.json": sample, "dev.json": sample})
    assert load_glue("mnli", tmp_path).evals["dev"].labels == [1]


BAD_GLUE = {
    "unknown task": ("wnli", {}, "unknown GLUE task 'wnli'"),
    "no folder": ("rte", {}, "neither a folder 'RTE'"),
    "no dev": ("sst2", {"SST-2/train.tsv": "sentence\tlabel\na\t1\n"}, "no dev.tsv"),
    "label outside": ("sst2", {"SST-2/train.tsv": "sentence\tlabel\na\t2\n"}, "row 1: label '2' is outside the range"),
    "label as text": (
        "rte",
        {"RTE/train.tsv": "sentence1\tsentence2\tlabel\na\tb\tmaybe\n"},
        "entailment, not_entailment",
    ),
    "short row": ("sst2", {"SST-2/train.tsv": "sentence\tlabel\na\t1\nb\n"}, "line 3: 1 columns where 2"),
    "no column": (
        "sst2",
        {"SST-2/train.tsv": "text\tlabel\na\t1\n"},
        "no column 'sentence'; its columns are text, label",
    ),
    "empty file": ("sst2", {"SST-2/train.tsv": ""}, "holds no examples"),
    "empty text": ("sst2", {"SST-2/train.tsv": "sentence\tlabel\n \t1\n"}, "row 1: column 'sentence' holds ' '"),
    "score is NaN": ("stsb", {"STS-B/train.tsv": "sentence1\tsentence2\tscore\na\tb\tnan\n"}, "no finite number"),
}


@pytest.mark.parametrize("what", BAD_GLUE)
def test_bad_glue_data_is_refused_with_the_place(what: str, tmp_path: Path) -> None:
    task, files, message = BAD_GLUE[what]
    for name, text in files.items():
        write((tmp_path / name).parent, {Path(name).name: text})
        write((tmp_path / name).parent, {} if what == "no dev" else {"dev.tsv": text})
    with pytest.raises(DataError) as caught:
        load_glue(task, tmp_path)
    assert message in str(caught.value)


@pytest.mark.skipif(not (SHARED / "glue").is_dir(), reason="the real GLUE folders are not beside the checkout")
@pytest.mark.parametrize(
    ("task", "train", "dev"),
    [("cola", 8551, 1043), ("mrpc", 3668, 408), ("rte", 2490, 277), ("stsb", 5749, 1500), ("sst2", 67349, 872)],
)
def test_real_glue_loads_whole(task: str, train: int, dev: int) -> None:
    data = load_glue(task, SHARED / "glue")
    assert (len(data.train), len(data.evals["dev"])) == (train, dev)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_file_format_gives_the_same_task(suffix: str, tmp_path: Path) -> None:
    rows = [{"body": f"text {i}", "mood": ("sad", "glad", "mad")[i % 3]} for i in range(9)]
    path = tmp_path / f"data.{suffix}"
    if suffix in ("csv", "tsv"):
        sign = "," if suffix == "csv" else "\t"
        path.write_text(
            "\n".join([f"body{sign}mood", *(f"{r['body']}{sign}{r['mood']}" for r in rows)]), encoding="utf-8"
        )
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    data = load_files(str(path), str(path), "body", "mood")
    assert data.spec.label_names == ("glad", "mad", "sad")
    assert data.train.labels == [2, 0, 1] * 3
    assert data.train.texts == [r["body"] for r in rows]


def test_without_evaluation_data_a_tenth_is_held_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\n" + "\n".join(f"t{i},{i % 2}" for i in range(50)), encoding="utf-8")
    data = load_files(str(path), None, "text", "label")
    assert (len(data.train), len(data.evals["eval"])) == (45, 5)
    assert not set(data.train.texts) & set(data.evals["eval"].texts)
    assert "5 of 50" in data.notes[0]
    assert load_files(str(path), None, "text", "label") == data


def test_fractions_make_a_regression(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\na,1.5\nb,2\nc,0.25\n", encoding="utf-8")
    assert load_files(str(path), str(path), "text", "label").spec.regression


BAD_FILES = {
    "unknown column": ("text,label\na,1\n", "body", "no column 'body'; its columns are text, label"),
    "empty label": ("text,label\na,1\nb,\n", "text", "row 2: column 'label' is empty"),
    "NaN label": ("text,label\na,1\nb,nan\n", "text", "row 2"),
    "negative class": ("text,label\na,-1\nb,1\n", "text", "from -1 to 1"),
    "one class": ("text,label\na,x\nb,x\n", "text", "only one class"),
    "empty text": ("text,label\n,0\nb,1\n", "text", "row 1: column 'text'"),
    "short row": ("text,label\na\nb,1\n", "text", "line 2"),
    "long row": ("text,label\na,0,9\nb,1\n", "text", "line 2"),
    "nothing": ("text,label\n", "text", "no examples"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_refused_with_the_place(what: str, tmp_path: Path) -> None:
    text, column, message = BAD_FILES[what]
    path = tmp_path / "d.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_files(str(path), str(path), column, "label")
    assert message in str(caught.value)


def test_a_label_that_training_has_not_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,x\nb,y\n", encoding="utf-8")
    (tmp_path / "e.csv").write_text("text,label\na,z\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"label 'z' is outside the range.* x, y"):
        load_files(str(tmp_path / "t.csv"), str(tmp_path / "e.csv"), "text", "label")
    spec = TaskSpec("t", ("text",), 2, ("x", "z"), ("accuracy",), "accuracy")
    assert load_evaluation(spec, str(tmp_path / "e.csv"), "text", "label").labels == [1]


def test_metrics_equal_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    scores, gold = draw.normal(size=(200, 2)), draw.integers(0, 2, 200)
    guess = scores.argmax(1)
    assert compute(GLUE["mrpc"], scores, gold) == {"accuracy": accuracy_score(gold, guess), "f1": f1_score(gold, guess)}
    assert compute(GLUE["cola"], scores, gold) == {"matthews": pytest.approx(matthews_corrcoef(gold, guess))}


def test_correlations_by_hand_and_with_a_constant() -> None:
    gold = np.array([1.0, 2.0, 3.0, 4.0])
    found = compute(GLUE["stsb"], np.array([[1.0], [2.0], [3.0], [10.0]]), gold)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(14 / (5 * 50) ** 0.5)  # cov 14, variances 5 and 50
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + 1) / 2)
    assert compute(GLUE["stsb"], np.ones((4, 1)), gold)["pearson_spearman"] == 0.0


def test_a_diverged_model_is_not_scored() -> None:
    with pytest.raises(DataError, match="diverged"):
        compute(GLUE["sst2"], np.array([[np.nan, 1.0]]), np.array([1]))
