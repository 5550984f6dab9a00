"""Tests the scripts of ``benchmarks/`` that judge a record and write its tables, on a record without a model."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench_tiny import settings_for, write_config

from unmask.lab.bench.rows import parse_rows
from unmask.lab.bench.run import run_bench
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.training.fields import converted

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bars

    return bars


@pytest.fixture
def record(tmp_path):
    """Returns the record of two draws in which static takes 1.05 and id3-10 1.06 times the frozen step."""
    seconds = {"frozen": 1.0, "static": 1.05, "id3-10": 1.06, "id3": 1.2, "full": 2.0}
    peaks = {"frozen": 100.0, "static": 120.0, "id3-10": 120.0, "id3": 160.0, "full": 200.0}

    def measured(settings, row):
        steps = [
            {"draw": 0, "forward": seconds[row.label], "backward": 0.0, "optimizer": 0.0, "selecting": not i}
            for i in range(row.cycle)
        ]
        memory = {"peak_mb": peaks[row.label], "before_mb": 50.0, "state_bytes": 8, "saved_bytes": 40}
        return {"steps": steps, "weights": {"trainable": 10, "trained": 10}, "memory": memory}

    folder = write_config(tmp_path / "tiny")
    settings = settings_for(folder, tmp_path / "OUT/reference", methods=",".join(seconds))
    return run_bench(settings, lambda line: None, f"unmask bench --output {tmp_path}/OUT/reference", measured)


def at_the_reference(record: dict) -> dict:
    """Returns the record with the settings that the bars are defined for."""
    settings = record["settings"] | {"model": "roberta-base", "budget": 320_000, "threads": 2}
    return record | {"settings": settings, "model": record["model"] | {"batch_size": 16, "seq_len": 128}}


def test_every_row_of_a_bar_is_a_row_of_the_benchmark(bars):
    assert len(bars.BARS) == 11
    assert [bar.limit for bar in bars.BARS] == [1.05, 0.88, 0.62, 0.93, 0.65, 0.65, 0.95, 0.70, 1.28, 1.15, 0.90]
    rows = [row for bar in bars.BARS for row in (*bar.numerators, bar.denominator)]
    assert len(parse_rows(",".join(dict.fromkeys(rows)), 1)) == len(set(rows))
    assert {bar.dtype for bar in bars.BARS} == {"float32", "autocast"}


def test_bars_are_met_missed_or_not_measured(bars, record):
    chosen = (
        bars.Bar("cheap", ("static", "id3-10"), "frozen", "step", 1.055),
        bars.Bar("small", ("id3",), "full", "memory", 0.7),
        bars.Bar("gone", ("static",), "shira", "step", 0.65),
        bars.Bar("other dtype", ("static",), "frozen", "step", 0.1, "autocast"),
    )
    found = bars.judge(record, chosen)
    assert [(entry["bar"], entry["row"], entry["verdict"]) for entry in found] == [
        ("cheap", "static", "met"),
        ("cheap", "id3-10", "not met"),
        ("small", "id3", "not met"),
        ("gone", "static", "not measured"),
    ]
    assert found[0]["measured"] == pytest.approx(1.05)
    assert found[0]["draws"]["each"] == pytest.approx([1.05, 1.05])
    assert found[0]["amortised"] is None
    assert found[1]["amortised"] == pytest.approx(1.06)  # all steps of this record take equally long
    assert found[2]["measured"] == 0.8
    assert found[3]["measured"] is None
    assert [line[1] for line in bars.table(found)] == ["static", "id3-10", "id3"]


def test_bars_apply_to_one_configuration_only(bars, record):
    reference = at_the_reference(record)
    assert bars.off_reference(reference) == []
    for name, value in (("threads", 1), ("budget", 10), ("dtype", "bf16"), ("lora_r", 4), ("model", "mpnet")):
        changed = reference | {"settings": reference["settings"] | {name: value}}
        assert [reason.split()[0] for reason in bars.off_reference(changed)] == [name]
    assert bars.off_reference(reference | {"settings": reference["settings"] | {"dtype": "autocast"}}) == []
    cuda = reference | {"machine": reference["machine"] | {"device": "cuda"}}
    assert bars.off_reference(cuda) == ["device is cuda, not cpu"]
    assert len(bars.off_reference(record)) == 5  # it differs in model, budget, threads, batch size and length


def test_a_page_gets_new_sections_and_keeps_its_others(bars, record, tmp_path, monkeypatch):
    import page

    out, folder = tmp_path / "OUT", tmp_path / "results"
    folder.mkdir()
    (folder / "reference.md").write_text("# Title\n\n## Fused AdamW and Super-Tuning\n\nkept\n")
    (out / "reference/bench.json").write_text(json.dumps(at_the_reference(record)))
    monkeypatch.setattr(sys, "argv", ["page.py", str(out), str(folder)])
    for _ in range(2):  # The second time nothing changes.
        page.main()
        text = (folder / "reference.md").read_text()
        titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert titles == [page.PAGES["reference"][1][name] for name in ("reference", "reference-rest")]
        assert "    unmask bench --output OUT/reference\n" in text
        assert "| static and ID3 stride 10, step, against the frozen backward | static | 1.05 | 1.050 |" in text
        assert text.endswith("kept\n")
    assert [path.name for path in folder.iterdir()] == ["reference.md"]


def test_the_pages_of_results_name_their_runs_and_have_every_bar(bars):
    import page

    for name, (heading, runs) in page.PAGES.items():
        text = (BENCHMARKS / "results" / f"{name}.md").read_text()
        sections = page.sections_of(text)
        assert text.startswith(f"# {heading}\n")
        assert set(runs.values()) & set(sections)
        assert all(body.startswith(("    unmask bench", "    python benchmarks/")) for body in sections.values())
    limits = {f"{bar.limit:.2f}" for bar in bars.BARS}
    printed = (BENCHMARKS / "results/reference.md").read_text() + (BENCHMARKS / "results/memory.md").read_text()
    assert limits <= set(re.findall(r"\| (\d\.\d\d) \|", printed))


def test_the_gpu_script_writes_what_it_has_and_ends_in_time(tmp_path):
    """A stand-in for ``unmask`` notes its words; the second table fails, and the script goes on."""
    stand_in = tmp_path / "unmask"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\ncase "$*" in *llama-7b*) exit 3;; esac\n')
    stand_in.chmod(0o755)
    command = ["bash", str(BENCHMARKS / "gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**os.environ, "UNMASK": str(stand_in)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "llama-7b: ended with status 3\n"
    lines = [line.split()[1:] for line in (tmp_path / "said").read_text().splitlines()]
    for words in lines:  # every option is one that the benchmark has, and every row one that it knows
        given = {
            name[2:].replace("-", "_"): value for name, value in itertools.pairwise(words) if name.startswith("--")
        }
        settings = BenchSettings(**converted(BenchSettings, {**given, "host": "yes"} if "host" in given else given))
        assert settings.device == "cuda"
        assert Path(settings.output).parent == tmp_path / "out"
    assert [words[-1].rsplit("/", 1)[1] for words in lines] == ["host", "llama-7b", "llama-1b", "roberta-base"]
    late = subprocess.run(command, env={**os.environ, "LIMIT": "10"}, capture_output=True, text=True, check=True)
    assert late.stdout.count("no time is left") == 4
