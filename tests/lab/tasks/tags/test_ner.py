"""Tests loading of tagged sentences in every format, and the refusals."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT

from unmask.errors import DataError
from unmask.lab.tasks import NER, TagSpec, load_ner, load_tagged, load_tagged_evaluation
from unmask.lab.tasks.tags.conll import read_conll
from unmask.lab.tasks.tags.spans import spans
from unmask.lab.tasks.tags.spec import Sentences

REAL = ROOT.parent / "shared" / "data" / "wnut17"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the shared data folder is not next to the checkout")


# ---------------------------------------------------------------- the column format

IOB1 = """-DOCSTART- -X- -X- O

Ann NNP I-NP I-PER
Lee NNP I-NP I-PER
Bo NNP B-NP B-PER
left VBD I-VP O
Rome NNP I-NP I-LOC
. . O O

-DOCSTART- -X- O O

EU NNP I-NP I-ORG
"""
IOB2_TAGS = [["B-PER", "I-PER", "B-PER", "O", "B-LOC", "O"], ["B-ORG"]]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def test_conll_2003_columns_in_iob1_and_in_iob2(tmp_path):
    one, notes = read_conll(write(tmp_path / "eng.train.txt", IOB1))
    assert one.words == [["Ann", "Lee", "Bo", "left", "Rome", "."], ["EU"]]
    assert one.tags == IOB2_TAGS
    assert notes == ("eng.train.txt: IOB1, read as IOB2",)
    as_iob2 = IOB1.replace("Ann NNP I-NP I-", "Ann NNP I-NP B-").replace("I-LOC", "B-LOC").replace("I-ORG", "B-ORG")
    assert read_conll(write(tmp_path / "two.txt", as_iob2)) == (one, ())


def test_tabs_byte_order_marks_windows_line_ends_and_no_last_line_end(tmp_path):
    """The files of WNUT17 have blank lines that hold a tab, and a line that holds only a byte-order mark."""
    plain, _ = read_conll(write(tmp_path / "a.conll", "@a\tO\nNew\u00a0York\tB-location\n\nb\u2028c\tO"))
    assert plain.words == [["@a", "New\u00a0York"], ["b\u2028c"]]
    odd = "\ufeff@a\tO\r\nNew\u00a0York\tB-location\r\n\t\r\n\n\ufeff\nb\u2028c\tO\n\n\n"
    assert read_conll(write(tmp_path / "b.conll", odd))[0] == plain
    (tmp_path / "c.conll.gz").write_bytes(gzip.compress(odd.encode()))
    assert read_conll(tmp_path / "c.conll.gz")[0] == plain


def test_a_stray_tag_in_iob2_begins_an_entity_and_a_note_says_so(tmp_path):
    found, notes = read_conll(write(tmp_path / "a.conll", "a\tB-X\nb\tI-Y\nc\tB-Y\n\nd\tB-X\n"))
    assert found.tags == [["B-X", "B-Y", "B-Y"], ["B-X"]]
    assert notes == ("a.conll: 1 tags I- continue no entity of their type; each is taken as the beginning of one",)


BAD_LINES = {
    "one column": ("word\n", r"a\.conll, line 1 has 1 columns where 2 are needed"),
    "another width": ("a NN O\nb O\n", r"line 2 has 2 columns where 3 are needed"),
    "a word that was split": ("a\tO\nNew York O\n", r"line 2 has 3 columns where 2"),
    "another scheme": ("a B-X\nb E-X\n", r"line 2: 'E-X' is not a tag; .*BIOES"),
    "a type alone": ("a PER\n", r"line 1: 'PER' is not a tag"),
    "no type": ("a B-\n", r"line 1: 'B-' is not a tag"),
    "an empty word": ("a\tO\n\tO\n", r"line 2: the word is empty"),
    "no words": ("\n-DOCSTART- O\n\n", r"is empty: it holds no words"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_refused_with_their_place(tmp_path, case):
    text, message = BAD_LINES[case]
    with pytest.raises(DataError, match=message):
        read_conll(write(tmp_path / "a.conll", text))


def test_a_file_that_is_damaged_or_missing_is_refused(tmp_path):
    (tmp_path / "a.conll").write_bytes("é\tO\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.conll' cannot be read as conll \(in UTF-8\)"):
        read_conll(tmp_path / "a.conll")
    (tmp_path / "a.conll.gz").write_bytes(gzip.compress(b"Ann B-PER\n")[:10] + bytes(99))
    with pytest.raises(DataError, match=r"a\.conll\.gz' cannot be read as conll"):
        read_conll(tmp_path / "a.conll.gz")
    (tmp_path / "a.conll.gz").unlink()
    with pytest.raises(DataError, match=r"no file .*b\.conll'; .*holds a\.conll"):
        read_conll(tmp_path / "b.conll")


# ---------------------------------------------------------------- tasks from folders


@pytest.mark.parametrize(
    ("name", "files", "inside"),
    [
        ("conll2003", ("eng.train", "eng.testa", "eng.testb"), ""),
        ("conll2003", ("train.txt", "valid.txt", "test.txt"), "CoNLL-2003"),
        ("wnut17", ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"), "wnut_17"),
        ("ner", ("train.bio", "dev.bio", "test.bio.gz"), ""),
    ],
)
def test_folders_give_the_splits(tmp_path, name, files, inside):
    kind = NER[name].types[0] if name in NER else "THING"
    for number, file in enumerate(files):
        text = f"word{number} B-{kind}\nx O\n"
        path = write(tmp_path / inside / file, text)
        if file.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
    for folder in (tmp_path, tmp_path / inside):
        data = load_ner(name, folder)
        assert list(data.evals) == ["dev", "test"]
        words = [split.words[0][0] for split in (data.train, *data.evals.values())]
        assert words == ["word0", "word1", "word2"]
        assert data.spec == NER.get(name, TagSpec("ner", ("THING",)))
        assert any("not the official" in note for note in data.notes) == (name != "ner")
    (tmp_path / inside / files[0]).unlink()
    with pytest.raises(DataError, match=rf"{name} needs a file train .*{folder.name}' holds .*{files[1]}"):
        load_ner(name, tmp_path)
    known = TagSpec("ner", ("THING",)) if name == "ner" else None
    assert len(load_ner(name, tmp_path, need_train=False, spec=known).train) == 0


def test_wrong_names_folders_and_types_are_refused(tmp_path):
    with pytest.raises(DataError, match="unknown NER task 'conll'; there are conll2003, wnut17, and ner for your own"):
        load_ner("conll", tmp_path)
    with pytest.raises(DataError, match="task 'ner' is your own"):
        load_ner("ner")
    with pytest.raises(DataError, match=r"no data folder .*nowhere"):
        load_ner("wnut17", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"wnut17 needs a file train and a file dev"):
        load_ner("wnut17", tmp_path)
    for split in ("train", "dev"):
        write(tmp_path / "wnut17" / f"{split}.conll", "Ann B-PER\n")
    with pytest.raises(DataError, match=r"is the folder of wnut17, not of conll2003"):
        load_ner("conll2003", tmp_path / "wnut17")
    with pytest.raises(
        DataError, match=r"the train split has entities of type 'PER'; the task's types are corporation"
    ):
        load_ner("wnut17", tmp_path)
    write(tmp_path / "wnut17" / "train.txt", "Ann B-PER\n")
    with pytest.raises(DataError, match=r"both train\.conll and train\.txt"):
        load_ner("wnut17", tmp_path)
    (tmp_path / "WNUT-17").mkdir()
    with pytest.raises(DataError, match="holds more than one folder for wnut17: WNUT-17, wnut17"):
        load_ner("wnut17", tmp_path)


def test_a_note_counts_the_evaluation_sentences_that_are_in_the_training_data(tmp_path):
    write(tmp_path / "train.conll", "Ann B-P\nleft O\n\nx O\n")
    write(tmp_path / "dev.conll", "ann B-P\nleft O\n\ny O\n")
    assert "1 of 2 dev sentences are in the training data too" in load_ner("ner", tmp_path).notes[0]


@real
def test_the_real_wnut17_has_all_its_sentences_and_entities():
    """Compares with the sentences of its paper, and with the B- tags that grep counts and the one stray I- of dev."""
    data = load_ner("wnut17", REAL)
    assert [len(split) for split in (data.train, *data.evals.values())] == [3_394, 1_009, 1_287]
    entities = [sum(len(spans(tags)) for tags in split.tags) for split in (data.train, *data.evals.values())]
    assert entities == [1_975, 835 + 1, 1_079]
    assert [note for note in data.notes if "I-" in note] == [
        "emerging.dev.conll: 1 tags I- continue no entity of their type; each is taken as the beginning of one"
    ]
    assert len(data.notes) == 1
    kinds = Counter(kind for tags in data.evals["test"].tags for kind, _, _ in spans(tags))
    assert kinds == {
        "person": 429,
        "group": 165,
        "location": 150,
        "creative-work": 142,
        "product": 127,
        "corporation": 66,
    }


# ---------------------------------------------------------------- the user's files, and the hub

ROWS = [(["Ann", "left"], ["B-PER", "O"]), (["to", "Rome"], ["O", "B-LOC"]), (["x"], ["O"])]


def test_every_format_gives_the_same_sentences(tmp_path):
    column = "\n\n".join("\n".join(f"{w} {t}" for w, t in zip(*row, strict=True)) for row in ROWS)
    records = [{"id": i, "tokens": words, "ner_tags": tags} for i, (words, tags) in enumerate(ROWS)]
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(records), tmp_path / "t.parquet")
    files = [write(tmp_path / "t.conll", column), write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, records)))]
    for path in (*files, tmp_path / "t.parquet"):
        data = load_tagged(path, path)
        assert data.train == data.evals["eval"] == Sentences(*map(list, zip(*ROWS, strict=True)))
        assert data.spec == TagSpec("ner", ("LOC", "PER"))
    renamed = [{"w": words, "t": tags} for words, tags in ROWS]
    path = write(tmp_path / "r.json", json.dumps(renamed))
    assert load_tagged(path, path, "w", "t").train == data.train
    with pytest.raises(DataError, match="no column 'tokens'; its columns are w, t"):
        load_tagged(path, path)


BAD_ROWS = {
    "ids": ({"tokens": ["a"], "tags": [1]}, r"line 1: 1 is not a tag; tags are O, B-type or I-type, as text"),
    "texts": ({"tokens": "a b", "tags": "O O"}, r"line 1: there must be a list of words"),
    "too few tags": (
        {"tokens": ["a", "b"], "tags": ["O"]},
        r"line 1: there must be a list of words and a list of as many",
    ),
    "no word": ({"tokens": ["a", ""], "tags": ["O", "O"]}, r"line 1: '' is not a word"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_with_their_place(tmp_path, case):
    row, message = BAD_ROWS[case]
    path = write(tmp_path / "t.jsonl", json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        load_tagged(path, path)


def test_files_that_make_no_task_are_refused(tmp_path):
    train = write(tmp_path / "t.conll", "Ann B-PER\n")
    with pytest.raises(DataError, match=r"no file 'nowhere' .*not a hub id.* must end in \.conll"):
        load_tagged("nowhere", None)
    with pytest.raises(DataError, match=r"t\.csv' is not a file of tagged sentences; the name of one ends in \.conll"):
        load_tagged(write(tmp_path / "t.csv", "a,b\n"), None)
    with pytest.raises(DataError, match="there is no entity in the training data"):
        load_tagged(write(tmp_path / "o.conll", "a O\n"), None)
    dev = write(tmp_path / "dev.conll", "Rome B-LOC\n")
    with pytest.raises(
        DataError, match=r"the eval split has entities of type 'LOC'; .* are PER \(what training shows\)"
    ):
        load_tagged(train, dev)
    with pytest.raises(DataError, match=r"type 'LOC'"):
        load_tagged_evaluation(TagSpec("ner", ("PER",)), dev)


def test_a_tenth_is_held_out_and_no_sentence_is_on_both_sides(tmp_path):
    text = "\n".join(f"word{i // 2} B-X\n" for i in range(100))  # Each sentence is there twice.
    data = load_tagged(write(tmp_path / "t.conll", text), None)
    assert (len(data.train), len(data.evals["eval"])) == (90, 10)
    assert "10 of 100 sentences are held out (seed 0)" in data.notes[0]
    assert len(data.notes) == 1  # No note says that some of them are in the training data.


@pytest.fixture
def fake_hub(monkeypatch):
    """Makes `datasets.load_dataset` return real data sets that a test adds."""
    datasets = pytest.importorskip("datasets")
    known = {}

    def add(path, names, revision=None, **splits):
        features = datasets.Features(
            {
                "tokens": datasets.Sequence(datasets.Value("string")),
                "ner_tags": datasets.Sequence(datasets.ClassLabel(names=list(names))),
            }
        )
        made = {
            split: datasets.Dataset.from_dict({"tokens": words, "ner_tags": tags}, features=features)
            for split, (words, tags) in splits.items()
        }
        known[path, None, revision] = datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, revision=None: known[path, config, revision])
    return add


@pytest.mark.parametrize(("name", "hub"), [("conll2003", "eriktks/conll2003"), ("wnut17", "leondz/wnut_17")])
def test_a_task_from_the_hub_equals_the_folder(tmp_path, fake_hub, name, hub):
    """The class names are in the order of the hub's ids, which the data sets' cards give."""
    names, first = NER[name].label_names, NER[name].types[0]
    rows = ([["Ann", "Lee", "x"], ["y"], []], [[1, 2, 0], [0], []])  # The hub's WNUT17 has a sentence without words.
    fake_hub(hub, names, "refs/convert/parquet", train=rows, validation=rows, test=rows)
    for split in ("train", "dev", "test"):
        write(tmp_path / f"{split}.conll", f"Ann B-{first}\nLee I-{first}\nx O\n\ny O\n")
    found, folder = load_ner(name), load_ner(name, tmp_path)
    assert (found.train, found.evals, found.spec) == (folder.train, folder.evals, folder.spec)
    assert any("1 sentences without words are left out" in note for note in found.notes)


def test_the_ids_of_the_tags_are_those_of_the_hub():
    assert NER["conll2003"].label_names == (
        "O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC",
    )  # fmt: skip
    assert NER["wnut17"].label_names[1:5] == ("B-corporation", "I-corporation", "B-creative-work", "I-creative-work")


def test_a_hub_data_set_that_the_user_names(fake_hub):
    rows = ([["Ann", "left"], ["x"]], [[1, 0], [0]])
    fake_hub("me/names", ["O", "B-N", "I-N"], train=rows, validation=([["Bo"]], [[1]]))
    data = load_tagged("me/names", None)
    assert (data.train.tags, data.evals["eval"].tags) == ([["B-N", "O"], ["O"]], [["B-N"]])
    with pytest.raises(DataError, match=r"no column 'words2'; its columns are tokens, ner_tags"):
        load_tagged("me/names", None, "words2")


def test_a_tenth_of_a_hub_data_set_without_evaluation_splits_is_held_out(fake_hub):
    words = [[f"word{i}"] for i in range(20)]
    fake_hub("me/all", ["O", "B-N", "I-N"], train=(words, [[1]] * 20))
    data = load_tagged("me/all", None)
    assert (len(data.train), len(data.evals["eval"])) == (18, 2)
    assert sorted(data.train.words + data.evals["eval"].words) == sorted(words)
    assert "2 of 20 sentences are held out (seed 0)" in data.notes[0]
