"""Tests loading of texts with labels in every format, the refusals, and the metrics against scikit-learn and scipy."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from unmask.errors import DataError, MissingExtraError
from unmask.lab.tasks import GLUE, Examples, TaskSpec, compute, load_evaluation, load_files, load_glue
from unmask.lab.tasks.split import hold_out_a_tenth
from unmask.lab.tasks.tables import TextFormat

REAL = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the shared data folder is not next to the checkout")
TSV = {
    "cola": 'gj04\t1\t\tThe sailors rode.\nks08\t0\t*\t"Him left.\n',
    "sst2": "sentence\tlabel\na fine film \t1\nno good\t0\n",
    "mrpc": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said "no.\tNo, he said.\n0\t9\t8\tA\tB\n',
    "rte": "index\tsentence1\tsentence2\tlabel\n0\tA man.\tA woman.\tnot_entailment\n1\tA cat.\tAn animal.\tentailment\n",
    "stsb": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA\tB\t5.000\n1\tx\tC\tD\t0\n",
    "qnli": "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n1\tWhy?\tNo.\tnot_entailment\n",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n1\t3\t4\tIs it?\tIt is?\t1\n",
    "mnli": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA\tB\tneutral\tcontradiction\n1\tC\tD\tx\tneutral\n",
}
EXPECTED = {
    "cola": (["The sailors rode.", '"Him left.'], None, [1, 0]),
    "sst2": (["a fine film ", "no good"], None, [1, 0]),
    "mrpc": (['He said "no.', "A"], ["No, he said.", "B"], [1, 0]),
    "rte": (["A man.", "A cat."], ["A woman.", "An animal."], [1, 0]),
    "stsb": (["A", "C"], ["B", "D"], [5.0, 0.0]),
    "qnli": (["Who?", "Why?"], ["He.", "No."], [0, 1]),
    "qqp": (["Why?", "Is it?"], ["How?", "It is?"], [0, 1]),
    "mnli": (["A", "C"], ["B", "D"], [2, 1]),
}
FOLDERS = dict(zip(TSV, ("CoLA", "SST-2", "MRPC", "RTE", "STS-B", "QNLI", "QQP", "MNLI"), strict=True))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def glue_folder(root: Path, name: str, text: str | None = None) -> Path:
    folder = root / FOLDERS[name]
    for split in ("train", *(("dev_matched", "dev_mismatched") if name == "mnli" else ("dev",))):
        write(folder / f"{split}.tsv", text or TSV[name])
    return folder


# ---------------------------------------------------------------- GLUE


@pytest.mark.parametrize("name", TSV)
def test_official_files_give_the_texts_and_the_ids_of_the_hub(tmp_path, name):
    folder = glue_folder(tmp_path, name)
    for data_dir in (tmp_path, folder):
        data = load_glue(name, data_dir)
        assert data.train == Examples(*EXPECTED[name])
        assert list(data.evals) == (["dev_matched", "dev_mismatched"] if name == "mnli" else ["dev"])
        assert next(iter(data.evals.values())) == data.train
        assert "not the official" in data.notes[0]


def test_the_ids_of_the_class_names_are_those_of_the_hub():
    """The ids are those of GLUE's dataset card. Each name here has id 1."""
    named = {
        "cola": "acceptable",
        "sst2": "positive",
        "mrpc": "equivalent",
        "qqp": "duplicate",
        "rte": "not_entailment",
    }
    for name, label in named.items():
        assert GLUE[name].label_names.index(label) == 1
    assert GLUE["qnli"].label_names == GLUE["rte"].label_names
    assert GLUE["mnli"].label_names == ("entailment", "neutral", "contradiction")


def test_windows_line_ends_change_nothing_and_unicode_line_ends_stay_in_the_text(tmp_path):
    glue_folder(tmp_path, "sst2", "sentence\tlabel\r\nfine\u2028film\x85\rshot\t1\r\n")
    assert load_glue("sst2", tmp_path).train == Examples(["fine\u2028film\x85\rshot"], None, [1])


def test_cola_with_a_header_line_is_not_read_as_an_example(tmp_path):
    glue_folder(tmp_path, "cola", "sentence\tlabel\nThey ran.\t1\nRan they the.\t0\n")
    assert load_glue("cola", tmp_path).train == Examples(["They ran.", "Ran they the."], None, [1, 0])


@pytest.mark.parametrize(("name", "label", "expected"), [("mnli", "neutral", 1), ("qqp", "1", 1), ("rte", 0, 0)])
def test_json_samples_are_read(tmp_path, name, label, expected):
    rows = {"0": {"text_a": "A", "text_b": "B", "label": label}}
    for split in ("train", "dev"):
        write(tmp_path / name / f"{split}.json", json.dumps(rows))
    data = load_glue(name, tmp_path)
    assert data.train == data.evals["dev"] == Examples(["A"], ["B"], [expected])


def test_qqp_leaves_out_cut_short_rows_and_says_how_many_and_others_do_not(tmp_path):
    glue_folder(tmp_path, "qqp", TSV["qqp"] + "2\t5\t6\tcut\n3\t7\t8\t\tone is empty\t0\n")
    data = load_glue("qqp", tmp_path)
    assert data.train.texts == ["Why?", "Is it?", ""]
    assert any("train.tsv: 1 rows" in note for note in data.notes)
    glue_folder(tmp_path, "rte", TSV["rte"] + "2\tcut\n")
    with pytest.raises(DataError, match=r"train\.tsv, line 4 has 2 columns where 4 are needed"):
        load_glue("rte", tmp_path)


def test_evaluation_alone_needs_no_training_file(tmp_path):
    (glue_folder(tmp_path, "qnli") / "train.tsv").unlink()
    with pytest.raises(DataError, match=r"qnli needs train\.tsv; .*holds dev\.tsv"):
        load_glue("qnli", tmp_path)
    data = load_glue("qnli", tmp_path, need_train=False)
    assert (len(data.train), len(data.evals["dev"])) == (0, 2)


BAD_GLUE = {
    "a label text": ("rte", "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tmaybe\n", r"line 2.*'maybe'.*not_entailment"),
    "a label id": ("sst2", "sentence\tlabel\nok\t1\nok\t2\n", r"line 3.*'2'.*allowed: 0 to 1 or negative, positive"),
    "a score": ("stsb", "sentence1\tsentence2\tscore\nA\tB\t5.1\n", r"line 2.*'5\.1' is outside.*0 to 5"),
    "a score text": ("stsb", "sentence1\tsentence2\tscore\nA\tB\tnan\n", r"line 2.*missing \('nan'\)"),
    "an empty text": ("sst2", "sentence\tlabel\n \t1\n", r"line 2.*'sentence' is empty"),
    "no label column": ("sst2", "sentence\tclass\nok\t1\n", r"no column 'label'; its columns are sentence, class"),
    "too many cells": ("sst2", "sentence\tlabel\nok\tx\t1\n", r"line 2 has 3 columns where 2.*without quotes"),
    "no rows": ("sst2", "sentence\tlabel\n", r"train\.tsv' is empty"),
    "no bytes": ("sst2", "\n", r"train\.tsv' is empty"),
    "a column twice": ("sst2", "sentence\tlabel\tlabel\nok\t1\t0\n", r"'label' is there more than once"),
}


@pytest.mark.parametrize("case", BAD_GLUE)
def test_bad_glue_files_are_refused_with_their_place(tmp_path, case):
    name, text, message = BAD_GLUE[case]
    glue_folder(tmp_path, name, text)
    with pytest.raises(DataError, match=message):
        load_glue(name, tmp_path)


def test_wrong_names_and_folders_are_refused(tmp_path):
    with pytest.raises(
        DataError, match="unknown GLUE task 'wnli'; there are cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb"
    ):
        load_glue("wnli", tmp_path)
    with pytest.raises(DataError, match=r"no data folder .*nowhere"):
        load_glue("rte", tmp_path / "nowhere")
    folder = glue_folder(tmp_path, "qnli")
    with pytest.raises(DataError, match="is the folder of qnli, not of rte"):
        load_glue("rte", folder)
    with pytest.raises(DataError, match=r"neither a folder 'RTE' nor train\.tsv: .*holds QNLI"):
        load_glue("rte", tmp_path)
    write(folder / "train.json", "{}")
    with pytest.raises(DataError, match=r"both train\.tsv and train\.json"):
        load_glue("qnli", tmp_path)


@real
@pytest.mark.parametrize(
    ("folder", "name", "train", "dev", "labels"),
    [
        ("glue", "cola", 8551, 1043, {0: 322, 1: 721}),
        ("glue", "sst2", 67349, 872, {0: 428, 1: 444}),
        ("glue", "mrpc", 3668, 408, {0: 129, 1: 279}),
        ("glue", "rte", 2490, 277, {0: 146, 1: 131}),
        ("glue", "qnli", 0, 5463, {0: 2702, 1: 2761}),
        ("glue_samples", "mnli", 8999, 1000, {0: 347, 1: 333, 2: 320}),
        ("glue_samples", "qnli", 8999, 1000, {0: 504, 1: 496}),
        ("glue_samples", "qqp", 8999, 1000, {0: 623, 1: 377}),
    ],
)
def test_the_real_sets_have_their_known_sizes(folder, name, train, dev, labels):
    """The sizes and class counts of the development sets are those of GLUE. The json module counted the samples."""
    data = load_glue(name, REAL / folder, need_train=train > 0)
    assert (len(data.train), len(data.evals["dev"])) == (train, dev)
    assert Counter(data.evals["dev"].labels) == labels
    assert any("not the official" in note for note in data.notes) == (folder == "glue_samples")


@real
def test_the_real_stsb_equals_the_rows_of_a_plain_csv_reader():
    data = load_glue("stsb", REAL / "glue").evals["dev"]
    with (REAL / "glue" / "STS-B" / "dev.tsv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert data == Examples(
        [r["sentence1"] for r in rows], [r["sentence2"] for r in rows], [float(r["score"]) for r in rows]
    )


# ---------------------------------------------------------------- the user's files

ROWS = [('good one, "really"', "yes"), ("two\nlines", "no"), ("third", "yes")]


def write_as(path: Path, rows: list[tuple]) -> Path:
    records = [{"text": text, "label": label} for text, label in rows]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    train = write_as(tmp_path / f"train{suffix}", ROWS)
    dev = write_as(tmp_path / f"dev{suffix}", [("new", "no")])
    data = load_files(train, dev, "text", "label")
    assert data.train == Examples([text for text, _ in ROWS], None, [1, 0, 1])
    assert data.evals == {"eval": Examples(["new"], None, [0])}
    assert data.spec.label_names == ("no", "yes")
    assert data.notes == ()


def test_gzip_and_unicode_line_ends_in_jsonl_are_read(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    lines = [json.dumps({"text": f"a\u2028{i}", "label": i % 2}, ensure_ascii=False) for i in range(2)]
    path.write_bytes(gzip.compress("\n".join(lines).encode("utf-8-sig")))
    assert load_files(path, path, "text", "label").train == Examples(["a\u20280", "a\u20281"], None, [0, 1])


def test_a_tsv_of_pairs_is_read_as_a_regression(tmp_path):
    path = write(tmp_path / "t.tsv", 'a\tb\ty\n"one\tx\t0.5\ntwo\ty\t2\n')
    data = load_files(path, path, "a", "y", "b")
    assert data.spec.regression
    assert data.train == Examples(['"one', "two"], ["x", "y"], [0.5, 2.0])
    assert "2 of 2 evaluation texts are in the training data" in data.notes[0]


@pytest.mark.parametrize(
    ("labels", "num_labels", "names", "expected"),
    [
        (["0", "2", "1"], None, ("0", "1", "2"), [0, 2, 1]),
        (["0.0", "1.0", "0.0"], None, ("0", "1"), [0, 1, 0]),
        (["0", "2", "0"], 4, ("0", "1", "2", "3"), [0, 2, 0]),
        (["1", "5", "3"], 1, None, [1.0, 5.0, 3.0]),
        (["-1.5", "2", "1e1"], None, None, [-1.5, 2.0, 10.0]),
        (["True", "False", "True"], None, ("False", "True"), [1, 0, 1]),
        (["b", "a", "c"], None, ("a", "b", "c"), [1, 0, 2]),
    ],
)
def test_labels_make_the_task(tmp_path, labels, num_labels, names, expected):
    path = write_as(tmp_path / "t.csv", [(f"text {i}", label) for i, label in enumerate(labels)])
    data = load_files(path, path, "text", "label", num_labels=num_labels)
    assert data.spec.label_names == names
    assert data.spec.num_labels == (len(names) if names else 1)
    assert data.train.labels == expected


BAD_LABELS = {
    "ids from 1": (["1", "2", "3"], None, "1, 2, 3; 3 classes have the ids 0 to 2"),
    "a gap": (["0", "2", "2"], None, "0, 2; 2 classes have the ids 0 to 1"),
    "negative": (["-1", "1", "1"], None, "-1, 1; 2 classes"),
    "text among numbers": (["0", "n/a", "1"], None, r"line 3: label 'n/a' .* is not a number, but others are"),
    "missing": (["0", "", "1"], None, r"line 3: the label is missing"),
    "NaN": (["0", "NaN", "1"], None, r"line 3: the label is missing"),
    "one class": (["a", "a", "a"], None, r"only one class \('a'\)"),
    "a fraction among ids": (["0", "1.5", "1"], 2, "1.5, which is not a class id"),
    "another number of classes": (["a", "b", "c"], 2, "3 classes .* num_labels = 2 does not fit"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_make_no_task_are_refused(tmp_path, case):
    labels, num_labels, message = BAD_LABELS[case]
    path = write_as(tmp_path / "t.csv", [(f"text {i}", label) for i, label in enumerate(labels)])
    with pytest.raises(DataError, match=message):
        load_files(path, path, "text", "label", num_labels=num_labels)


@pytest.mark.parametrize("unseen", ["maybe", "0", "1"])
def test_an_evaluation_label_that_training_lacks_is_refused(tmp_path, unseen):
    """The texts "0" and "1" are refused too, because as ids they would be scored as "no" and "yes" at random."""
    train = write_as(tmp_path / "train.csv", ROWS)
    dev = write_as(tmp_path / "dev.csv", [("a", "no"), ("b", unseen)])
    with pytest.raises(DataError, match=rf"dev\.csv, line 3, column 'label'.*'{unseen}'.*allowed: no, yes"):
        load_files(train, dev, "text", "label")
    with pytest.raises(DataError, match=rf"'{unseen}'"):
        load_evaluation(load_files(train, train, "text", "label").spec, dev, "text", "label")


BAD_FILES = {
    "unknown column": ("t.csv", b"a;b\nx;1\n", r"no column 'text'; its columns are a, b"),
    "short row": ("t.csv", b"text,label\nx,0\ny\n", r"t\.csv, line 3 has 1 columns where 2 are needed"),
    "open quote": ("t.csv", b'text,label\nx,0\n"y,1\n', r"t\.csv, line 3: .*mend the quotes"),
    "not UTF-8": ("t.csv", "text,label\nx,0\n".encode("utf-16"), r"cannot be read as csv \(in UTF-8\)"),
    "json lines as json": ("t.json", b'{"text": "x"}\n{"text": "y"}\n', r"cannot be read as json"),
    "broken line": ("t.jsonl", b'{"text": "x", "label": 0}\n{"text"\n', r"t\.jsonl, line 2 is no JSON"),
    "no record": ("t.jsonl", b'{"text": "x", "label": 0}\n[1]\n', r"line 2 is \[1\]; it must be a mapping"),
    "a number": ("t.json", b"3", r"holds a int; it must be a list of records"),
    "key missing": ("t.jsonl", b'{"text": "x", "label": 0}\n{"text": "y"}\n', r"line 2: the label is missing"),
    "no text": (
        "t.jsonl",
        b'{"text": 5, "label": 0}\n{"text": "y", "label": 1}\n',
        r"line 1: .*holds 5, which is not a text",
    ),
    "cut short": ("t.csv.gz", gzip.compress(b"text,label\nx,0\n" * 99)[:-12], r"cannot be read as csv"),
    "no parquet": ("t.parquet", b"text,label\n", r"cannot be read as parquet"),
    "damaged gzip": ("t.tsv.gz", gzip.compress(b"text\tlabel\nx\t0\n")[:10] + bytes(99), r"cannot be read as tsv"),
    "too deep": ("t.jsonl", b"[" * 9999 + b"]" * 9999, r"t\.jsonl, line 1 is nested deeper than 64 levels\. Mend"),
    "too deep in all": ("t.json", b"[" * 9999 + b"]" * 9999, r"cannot be read as json.* nested deeper than 64 levels"),
    "half a character": ("t.jsonl", b'{"text": "\\ud83d", "label": 0}\n', r"line 1 has half a character"),
    "a label of several": (
        "t.jsonl",
        b'{"text": "x", "label": [0]}\n{"text": "y", "label": "a"}\n',
        r"t\.jsonl, line 1: label \[0\] in column 'label' is a list",
    ),
    "one text": ("t.csv", b"text,label\nx,0\nx,1\n", r"t\.csv: 2 examples with 1 distinct texts cannot be split"),
    "a long header": ("t.csv", b"x" * 9000 + b",label\ny,0\n", r"^.{0,400}$"),
    "unknown format": ("t.xlsx", b"", r"has an unknown format; its name must end in \.csv, \.tsv"),
}


def test_a_large_number_in_another_column_is_accepted(tmp_path):
    rows = [{"text": f"{word} text", "label": i, "id": 2**64 + i} for i, word in enumerate(("a", "b"))]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in (path, tmp_path / "t.json"):
        assert load_files(file, path, "text", "label").train.texts == ["a text", "b text"]


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_with_their_place(tmp_path, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_files(tmp_path / name, None, "text", "label")


def test_missing_files_and_columns_are_refused(tmp_path):
    path = write_as(tmp_path / "train.csv", ROWS)
    with pytest.raises(DataError, match=r"no file .*trian\.csv'; .*holds train\.csv"):
        load_files(tmp_path / "trian.csv", None, "text", "label")
    with pytest.raises(DataError, match=r"no file .*dev\.csv'"):
        load_files(path, tmp_path / "dev.csv", "text", "label")
    with pytest.raises(DataError, match=r"no file 'train'.*not a hub id of the form 'user/name'"):
        load_files("train", None, "text", "label")
    with pytest.raises(DataError, match="must be different columns"):
        load_files(path, None, "text", "text")
    with pytest.raises(DataError, match=r"has 1 text columns .* do not fit"):
        load_evaluation(load_files(path, path, "text", "label").spec, path, "text", "label", "label")


def test_a_tenth_is_held_out_the_same_each_time_and_no_text_is_on_both_sides(tmp_path):
    rows = [
        (f"text {i // 2}" if i % 2 else f"Text  {i // 2}", "ab"[i % 2]) for i in range(100)
    ]  # Each text is there twice.
    path = write_as(tmp_path / "t.csv", rows)
    one, again, other = (load_files(path, None, "text", "label", seed=seed) for seed in (0, 0, 1))
    assert (len(one.train), len(one.evals["eval"])) == (90, 10)
    assert "10 of 100 examples are held out (seed 0)" in one.notes[0]
    assert one == again
    assert one.evals != other.evals
    train, held = ({text.lower().replace("  ", " ") for text in s.texts} for s in (one.train, one.evals["eval"]))
    assert not train & held
    assert len(train | held) == 50


def test_texts_that_cannot_be_split_are_refused():
    with pytest.raises(DataError, match="2 examples with 1 distinct texts cannot be split"):
        hold_out_a_tenth(Examples(["a", "A"], None, [0, 1]), "texts", seed=0)


# ---------------------------------------------------------------- the hub, without a network


@pytest.fixture
def fake_hub(monkeypatch):
    """Makes `datasets.load_dataset` return real data sets that a test adds. It refuses other ids as if it were offline."""
    datasets = pytest.importorskip("datasets")
    known = {}

    def load_dataset(path, config):
        if (path, config) not in known:
            raise ConnectionError(f"Couldn't reach\n{path!r} on the Hub")
        return known[path, config]

    def add(path, config, label_names, **splits):
        label = datasets.ClassLabel(names=label_names) if label_names else datasets.Value("float32")
        known[path, config] = datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(
                    columns,
                    features=datasets.Features(
                        {k: label if k == "label" else datasets.Value("string") for k in columns}
                    ),
                )
                for split, columns in splits.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return add


def test_glue_from_the_hub_equals_the_folder(tmp_path, fake_hub):
    rows = {"premise": ["A", "C"], "hypothesis": ["B", "D"], "label": [2, 1]}
    names = ["entailment", "neutral", "contradiction"]
    fake_hub("nyu-mll/glue", "mnli", names, train=rows, validation_matched=rows, validation_mismatched=rows)
    glue_folder(tmp_path, "mnli")
    assert load_glue("mnli") == load_glue("mnli", tmp_path)
    with pytest.raises(DataError, match=r"'nyu-mll/glue' \(sst2\) .*ConnectionError.*on the Hub.*data_dir"):
        load_glue("sst2")


def test_a_hub_data_set_keeps_its_class_ids_and_its_validation_split(fake_hub):
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 0]}
    fake_hub("me/films", None, ["pos", "neg"], train=rows, validation={"text": ["d"], "label": [1]})
    data = load_files("me/films", None, "text", "label")
    assert data.spec.label_names == ("pos", "neg")
    assert (data.train.labels, data.evals["eval"].labels) == ([0, 1, 0], [1])
    with pytest.raises(DataError, match=r"no column 'review'; its columns are text, label"):
        load_files("me/films", None, "review", "label")


def test_a_hub_data_set_without_labels_or_training_split_is_refused(fake_hub):
    fake_hub(
        "me/test", "x", ["n", "y"], train={"text": ["a", "b"], "label": [0, 1]}, test={"text": ["c"], "label": [-1]}
    )
    with pytest.raises(DataError, match=r"me/test:x, split 'test', row 1, column 'label': label -1"):
        load_files("me/test:x", None, "text", "label")
    fake_hub("me/dev", None, ["n", "y"], validation={"text": ["c"], "label": [1]})
    with pytest.raises(DataError, match=r"no split 'train'; its splits are 'validation'"):
        load_files("me/dev", None, "text", "label")


# ---------------------------------------------------------------- metrics


def scores_of(guess: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes)[guess] + np.random.default_rng(1).uniform(0, 0.4, (len(guess), classes))


@pytest.mark.parametrize("name", ["cola", "mrpc", "qqp", "sst2", "mnli"])
def test_class_metrics_equal_those_of_scikit_learn(name):
    from sklearn import metrics

    spec, draw = GLUE[name], np.random.default_rng(0)
    gold, guess = (draw.integers(0, spec.num_labels, 200) for _ in range(2))
    expected = {
        "accuracy": metrics.accuracy_score(gold, guess),
        "matthews": metrics.matthews_corrcoef(gold, guess),
        "f1": metrics.f1_score(gold, guess, average="binary" if spec.num_labels == 2 else "macro"),
    }
    found = compute(spec, scores_of(guess, spec.num_labels).astype(np.float32), gold)
    assert found == pytest.approx({metric: expected[metric] for metric in spec.metrics})
    assert spec.main_metric in found


def test_f1_and_matthews_worked_by_hand():
    """Counts by hand: there are two true positives, one false negative, one false positive and one true negative."""
    scores, gold = scores_of(np.array([1, 1, 0, 1, 0]), 2), np.array([1, 1, 1, 0, 0])
    assert compute(GLUE["mrpc"], scores, gold) == pytest.approx({"accuracy": 3 / 5, "f1": 4 / 6})
    assert compute(GLUE["cola"], scores, gold) == pytest.approx({"matthews": (2 * 1 - 1 * 1) / 6})


def test_correlations_equal_those_of_scipy_and_the_main_one_is_their_mean():
    from scipy import stats

    draw = np.random.default_rng(0)
    gold = draw.uniform(0, 5, 100).astype(np.float32)
    guess = (gold + draw.normal(0, 2, 100)).astype(np.float32) ** 3
    pearson, spearman = stats.pearsonr(gold, guess).statistic, stats.spearmanr(gold, guess).statistic
    assert abs(pearson - spearman) > 0.01
    for shape in ((100,), (100, 1)):
        found = compute(GLUE["stsb"], guess.reshape(shape), gold)
        expected = {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
        assert found == pytest.approx(expected, rel=1e-6)
    assert GLUE["stsb"].main_metric == "pearson_spearman"


@pytest.mark.parametrize("constant", [0.0, 0.1, 3.0, 1e6])
def test_a_constant_prediction_counts_as_no_correlation_without_a_warning(constant):
    gold = np.linspace(0, 5, 7)
    assert set(compute(GLUE["stsb"], np.full(7, constant, np.float32), gold).values()) == {0.0}
    nearly = constant * (1 + 1e-15 * np.arange(7))
    assert compute(GLUE["stsb"], nearly, gold)["pearson"] == 0.0
    same = np.zeros(5, dtype=int)
    assert compute(GLUE["cola"], scores_of(same, 2), same) == {"matthews": 0.0}
    assert compute(GLUE["mrpc"], scores_of(same, 2), same) == {"accuracy": 1.0, "f1": 0.0}


def test_mean_squared_error_worked_by_hand():
    spec = TaskSpec("t", ("text",), 1, None, ("mse",), "mse")
    assert compute(spec, np.array([1.0, 2.0]), np.array([0.0, 4.0])) == {"mse": 2.5}
    assert not spec.greater_is_better


@pytest.mark.parametrize(
    ("name", "predictions", "labels", "message"),
    [
        ("sst2", np.array([0.1, 0.9]), [0, 1], r"shape \(2,\).*must be \(n, 2\)"),
        ("sst2", np.zeros((2, 3)), [0, 1], r"shape \(2, 3\)"),
        ("sst2", np.zeros((2, 2)), [0, 1, 1], r"shape \(3,\)"),
        ("sst2", np.zeros((0, 2)), [], "n at least 1"),
        ("sst2", np.zeros((2, 2)), [0, -100], "label -100 of row 1 is not allowed; allowed: 0 to 1"),
        ("sst2", np.array([[0.0, np.nan]]), [0], "NaN or infinite"),
        ("stsb", np.array([[np.inf], [1.0]]), [0, 1], "NaN or infinite"),
        ("stsb", np.zeros(2), [0, np.nan], "label nan of row 1"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(name, predictions, labels, message):
    with pytest.raises(DataError, match=message):
        compute(GLUE[name], predictions, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_columns": ("a", "b", "c")}, "one or two"),
        ({"num_labels": 0}, "num_labels = 0"),
        ({"label_names": ("x",)}, "1 label_names for 2 labels"),
        ({"metrics": ("mse",), "main_metric": "mse"}, "'mse' does not fit 2 labels"),
        ({"main_metric": "f1"}, "main_metric = 'f1' is not among"),
    ],
)
def test_specs_that_do_not_fit_together_are_refused(changes, message):
    parts = {"name": "t", "text_columns": ("a",), "num_labels": 2, "label_names": None}
    with pytest.raises(DataError, match=message):
        TaskSpec(**{**parts, "metrics": ("accuracy",), "main_metric": "accuracy", **changes})


# ---------------------------------------------------------------- imports


def test_importing_tasks_loads_no_heavy_library():
    heavy = ("torch", "transformers", "datasets", "sklearn", "scipy", "pandas", "pyarrow")
    modules = "unmask.lab.tasks, unmask.lab.tasks.protocol, unmask.lab.tasks.names"
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("sklearn", "eval", lambda _: compute(GLUE["sst2"], np.eye(2), [0, 1])),
        ("scipy", "eval", lambda _: compute(GLUE["stsb"], np.arange(2.0), [0, 1])),
        ("datasets", "hf", lambda _: load_glue("sst2")),
        ("pyarrow", "hf", lambda path: load_files(path, None, "text", "label")),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, extra, call):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"")
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)

    class Without:
        """An import finder that does not know the module, so that it seems not to be installed."""

        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, path=None, target=None):
            return None if name.split(".")[0] == module else self.finder.find_spec(name, path, target)

    monkeypatch.setattr(sys, "meta_path", [Without(finder) for finder in sys.meta_path])
    with pytest.raises(MissingExtraError, match=rf"unmask\[{extra}\]"):
        call(path)


DELIMITED = {
    "semicolons": (";", None, "utf-8"),
    "tabs in a csv": ("\t", None, "utf-8"),
    "a mark that is named": ("|", "|", "utf-8"),
    "tab by its name": ("\t", "tab", "utf-8"),
    "latin-1": (",", None, "latin-1"),
    "cp1252 and semicolons": (";", None, "cp1252"),
    "UTF-16": (",", None, "utf-16"),
}


@pytest.mark.parametrize("case", DELIMITED)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_files_of_other_delimiters_and_encodings_are_read(tmp_path, case, ending):
    mark, delimiter, encoding = DELIMITED[case]
    rows = [["text", "label"], ["caf\u00e9, here", "gut"], [f"a {mark} b", "schlecht"]]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=mark).writerows(rows)
    path, raw = tmp_path / f"t.csv{ending}", text.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(raw) if ending else raw)
    data = load_files(path, path, "text", "label", form=TextFormat(delimiter, encoding))
    assert data.train == Examples([row[0] for row in rows[1:]], None, [0, 1])
    assert data.spec.label_names == ("gut", "schlecht")


def test_a_header_with_a_comma_is_divided_at_commas(tmp_path):
    path = write(tmp_path / "t.csv", "text;here,label\nx,0\ny,1\n")
    assert load_files(path, path, "text;here", "label").train.texts == ["x", "y"]


def test_formats_that_cannot_be_are_refused(tmp_path):
    for delimiter in ("", ";;", "\n", '"'):
        with pytest.raises(DataError, match="it must be one character"):
            TextFormat(delimiter)
    for encoding in ("nosuch", "base64", ""):
        with pytest.raises(DataError, match=r"Python knows no such encoding.*latin-1"):
            TextFormat(encoding=encoding)
    path = write_as(tmp_path / "t.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no csv or tsv file; leave the delimiter out"):
        load_files(path, path, "text", "label", form=TextFormat(";"))


LACKING = [("a", "no"), ("", "yes"), ("c", ""), ("d", "yes"), ("e", "nan")]


def test_rows_that_lack_something_are_counted_or_left_out(tmp_path):
    path = write_as(tmp_path / "t.csv", LACKING)
    with pytest.raises(DataError, match=r"line 3: the text .* is empty.* 3 of 5 rows lack .*--drop-missing"):
        load_files(path, path, "text", "label")
    data = load_files(path, path, "text", "label", drop_missing=True)
    assert data.train == Examples(["a", "d"], None, [0, 1])
    assert data.evals["eval"] == data.train
    assert [note.partition(": ")[2] for note in data.notes[:2]] == ["3 rows without a text or a label are left out"] * 2
    examples, notes = load_evaluation(data.spec, path, "text", "label", drop_missing=True)
    assert examples == data.train
    assert len(notes) == 1
    nothing = write_as(tmp_path / "none.csv", [("", "yes"), ("x", "")])
    with pytest.raises(DataError, match="2 of 2 rows lack"):
        load_files(nothing, nothing, "text", "label", drop_missing=True)


def test_a_bad_row_is_named_and_all_are_counted(tmp_path):
    train = write_as(tmp_path / "train.csv", ROWS)
    dev = write_as(tmp_path / "dev.csv", [("a", "no"), ("b", "maybe"), ("c", "what"), ("d", "never")])
    with pytest.raises(DataError, match=r"dev\.csv, line 3.*'maybe'.* 2 more rows have a fault too"):
        load_files(train, dev, "text", "label")
    mixed = write_as(tmp_path / "mixed.csv", [("a", "1"), ("b", "x"), ("c", "y"), ("d", "2")])
    with pytest.raises(DataError, match=r"line 3: label 'x' .* 1 more row has a fault too"):
        load_files(mixed, mixed, "text", "label")


def test_the_remedies_for_stars_are_accepted(tmp_path):
    """1 to 5 stars are no class ids. The error names three ways out, and each works."""
    stars = ["1", "5", "3", "2", "4"]
    path = write_as(tmp_path / "t.csv", [(f"text {i}", label) for i, label in enumerate(stars)])
    with pytest.raises(
        DataError, match=r"--num-labels 6\), or, for a regression on whole numbers, give --num-labels 1"
    ):
        load_files(path, path, "text", "label")
    assert load_files(path, path, "text", "label", num_labels=6).spec.num_labels == 6
    assert load_files(path, path, "text", "label", num_labels=1).train.labels == [1.0, 5.0, 3.0, 2.0, 4.0]
    written = write_as(tmp_path / "w.csv", [(f"text {i}", f"{label} stars") for i, label in enumerate(stars)])
    assert load_files(written, written, "text", "label").spec.num_labels == 5
