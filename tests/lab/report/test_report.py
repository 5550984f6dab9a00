"""Tests the report of sweeps: its tables are right, it needs no network, and no text from runs is executed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from commands import run
from studies import EVIL, VALUES, write_study

from unmask.errors import ConfigError, DataError
from unmask.lab.report import read_study, write_report
from unmask.lab.report.drawing import draw_files, inline
from unmask.lab.study.records import records
from unmask.lab.study.spec import Protocol
from unmask.lab.study.tables import figure, markdown, table

VOID = {"meta", "input", "br", "path", "use", "image", "line", "rect", "circle"}


class Page(HTMLParser):
    """Checks that the tags nest, and collects texts and attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_study(folder)
    return folder


@pytest.fixture(scope="module")
def text(study, tmp_path_factory):
    return write_report([study], tmp_path_factory.mktemp("out") / "report.html").read_text("utf-8")


def test_texts_from_runs_are_escaped(text):
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in text
    shown = "".join(page.texts)
    for place in ("Made up ", "A note ", "random ", "unmask sweep ", "ValueError: "):
        assert place + EVIL in shown, place
    assert not [a for a in page.attributes if a[1].startswith("on")]


def test_the_page_needs_no_network(text):
    page = Page(text)
    references = [a[2].strip() for a in page.attributes if a[1] in ("src", "href", "xlink:href")]
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in references)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes
    assert "default-src 'none'" in text


def test_the_page_fits_light_dark_and_narrow_screens(text):
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert 'content="light dark"' in text


def test_every_run_has_a_row_with_its_configuration(text, study):
    rows = text[text.index('class="sortable"') :].split("</tbody>")[0]
    known = read_study(study)
    assert rows.count("<tr>") - 1 == len(known.results)  # One row is the heading.
    for run_id in known.results:
        assert f"<code>{run_id}</code>" in rows
    assert rows.count("<dt>max_steps</dt><dd>60</dd>") == len(known.results)


def test_the_tables_figures_are_those_of_the_results(study):
    known = read_study(study)
    found = table(known.cells, known.results, known.protocol, known.choice)
    assert found.columns == ("mrpc", "cola")
    line = next(one for one in found.lines if one.labels == {"method": "id3", "budget": "0.2%"})
    entry = line.entries["cola"]
    assert (entry.value, entry.edge, len(entry.scores)) == ("1e-3", None, 3)
    wanted = {"method": "id3", "task": "cola", "budget": "0.2%", "lr": "1e-3"}
    scores = [r["score"] for r in known.results.values() if r["labels"] | wanted == r["labels"]]
    assert entry.seeds.mean == pytest.approx(sum(scores) / 3)
    assert entry.best.mean == pytest.approx(sum(scores) / 3)
    random = next(one for one in found.lines if one.labels["method"].startswith("random"))
    assert random.entries["mrpc"].edge == "low"
    assert line.average == pytest.approx((entry.seeds.mean + line.entries["mrpc"].seeds.mean) / 2)
    full = next(one for one in found.lines if one.labels == {"method": "full"})
    assert full.entries["mrpc"].edge == "alone"
    assert full.entries["mrpc"].trained == 20_000_000 - 770


def test_the_two_protocols_show_different_figures(study):
    known = read_study(study)
    seeds, paper = (
        table(known.cells, known.results, Protocol(kind=kind, best=2), known.choice) for kind in ("seeds", "paper")
    )
    one, two = (figure(t.lines[0].entries["mrpc"], t.protocol) for t in (seeds, paper))
    assert (one.n, two.n, two.of) == (3, 2, 3)
    assert two.mean > one.mean
    assert "(3) @ 1e-3" in markdown(seeds)
    assert "(best 2 of 3) @ 1e-3" in markdown(paper)


def test_the_choosing_seed_can_be_left_out_of_the_mean(tmp_path):
    write_study(tmp_path, {**VALUES, "choose": {"seeds": [0], "report": "others"}}, failing=-1)
    known = read_study(tmp_path)
    found = table(known.cells, known.results, known.protocol, known.choice)
    assert set(found.lines[0].entries["mrpc"].scores) == {"1", "2"}
    assert "not in the mean" in markdown(found)


def test_a_value_at_the_edge_is_marked(text):
    assert "the lowest value tried: the best may lie outside" in text


def test_figures_are_drawn_into_the_page(text):
    pytest.importorskip("matplotlib")
    assert text.count("<svg") == 3
    assert "not drawn" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_a_figure_with_a_name_that_matplotlib_cannot_read_is_left_out(study, tmp_path):
    pytest.importorskip("matplotlib")
    known = read_study(study)
    runs = records(known.cells, known.results, known.protocol, known.choice)
    odd = [{**run, "method": f"$\\frac$ {run['method']}"} for run in runs]  # Matplotlib reads it as mathematics.
    assert draw_files(["fig1"], odd, tmp_path / "odd") == []
    (shown,) = inline(["fig1"], odd, "s0")
    assert (shown["svg"], "frac" in shown["fault"]) == (None, True)
    assert len(draw_files(["fig1"], runs, tmp_path / "plain")) == 3


def test_two_studies_stand_on_one_page(study, tmp_path):
    text = write_report([study, study], tmp_path / "two.html").read_text("utf-8")
    assert text.count('class="study"') == 2
    assert '<a href="#s1">' in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def made_run(folder, score=0.75, **settings):
    """Writes the files of a finished run of `unmask train`."""
    folder.mkdir(parents=True)
    given = {"model": "m", "output": str(folder), "task": "rte", "budget": "100", "lr": 0.001, "seed": 3} | settings
    (folder / "config.yaml").write_text(json.dumps({key: value for key, value in given.items() if value is not None}))
    after = {"accuracy": score, "loss": 0.5}
    summary = {"main_metric": "accuracy", "main": score, "greater_is_better": True, "after": after}
    summary |= {"budget": 100, "parameters": 1000, "seconds": 12.5, "method": {"name": "id3", "strategy": "increment"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 5, "used": 50, "eval_accuracy": 0.7, "eval_loss": 0.6}) + "\n"
    )


def test_runs_of_train_can_be_reported(tmp_path):
    made_run(tmp_path / "runs" / "one")
    study = read_study(tmp_path / "runs")
    (result,) = study.results.values()
    assert (result["score"], result["curve"]) == (0.75, [{"step": 5, "used": 50, "score": 0.7, "loss": 0.6}])
    assert "75.00" in write_report([tmp_path / "runs"], tmp_path / "r.html").read_text("utf-8")


def test_runs_that_differ_in_any_setting_have_their_own_rows(tmp_path):
    own = {"task": None, "data": "a.csv"}
    differing = [
        own, {**own, "data": "b.csv"}, {**own, "max_steps": 9}, {**own, "batch_size": 4}, {**own, "model": "n"},
        {**own, "include": ["query"]}, {**own, "seed": 4},
    ]  # fmt: skip
    for number, settings in enumerate(differing):
        made_run(tmp_path / "runs" / str(number), score=0.5 + number / 100, **settings)
    study = read_study(tmp_path / "runs")
    found = table(study.cells, study.results, study.protocol)
    by_row = [sorted(entry.scores.values()) for line in found.lines for entry in line.entries.values()]
    assert sorted(by_row) == [[0.5, 0.56], [0.51], [0.52], [0.53], [0.54], [0.55]]  # two seeds are one row
    rows = [line.labels for line in found.lines]
    assert {"data": "b.csv"}.items() <= rows[1].items()
    assert {"max_steps": "9"}.items() <= rows[2].items()
    assert all(key in row for row in rows for key in ("data", "model"))
    assert "output" not in rows[0]
    assert "6 runs" not in write_report([tmp_path / "runs"], tmp_path / "r.html").read_text("utf-8")


def test_a_run_that_was_made_twice_is_shown_twice(tmp_path):
    for name, score in (("first", 0.25), ("second", 0.5)):
        made_run(tmp_path / "runs" / name, score=score)
    study = read_study(tmp_path / "runs")
    found = table(study.cells, study.results, study.protocol)
    assert [(line.labels["run"], *line.entries["rte"].scores.values()) for line in found.lines] == [
        ("first", 0.25),
        ("second", 0.5),
    ]


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no sweep"):
        read_study(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        read_study(tmp_path / "none")
    (tmp_path / "sweep.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match="Another version of unmask wrote it"):
        read_study(tmp_path)


def test_a_folder_as_the_output_is_refused(study, tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        write_report([study], tmp_path)


def test_the_command_writes_the_report(study, tmp_path):
    done = run("report", study, "--output", "out.html", cwd=tmp_path)
    assert done.stdout.startswith("report in out.html")
    assert run("report", "none", cwd=tmp_path, check=False).returncode == 1
