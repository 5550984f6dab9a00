"""Tests solving of test sets. The outputs are kept, and a kill at any moment costs one batch at most and changes nothing."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_llama import addition, byte_tokenizer, llama, math_folder, save_llama

import unmask.lab.tasks.math.solve
from unmask.errors import ConfigError, DataError
from unmask.lab.tasks.math.generate import GenerationSettings, generate
from unmask.lab.tasks.math.outputs import OutputFile
from unmask.lab.tasks.math.solve import SolveSettings, solve

IDENTITY = {"model": "tiny"}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return math_folder(tmp_path_factory.mktemp("math"))


@pytest.fixture(scope="module")
def model():
    return llama(torch.float64)


def settings(problems, sets=("svamp",), batch_size=3, **more):
    generation = GenerationSettings(max_new_tokens=8, batch_size=batch_size)
    return SolveSettings(sets, str(problems), generation=generation, **more)


def run(model, wanted, output, **more):
    quiet = Console(file=io.StringIO())
    return list(solve(model, byte_tokenizer(), wanted, output, IDENTITY, console=quiet, **more))


@pytest.fixture(scope="module")
def whole(model, problems, tmp_path_factory):
    """Returns the outputs of an uninterrupted run, as bytes."""
    output = tmp_path_factory.mktemp("whole")
    run(model, settings(problems), output)
    return (output / "svamp.jsonl").read_bytes()


@pytest.fixture
def counted(monkeypatch):
    """Counts the prompts that are generated for; `counted.stop = n` kills the run after n batches."""

    class Counted:
        prompts, stop = 0, None

        def __call__(self, model, tokenizer, prompts, how):
            for batch, (rows, written) in enumerate(generate(model, tokenizer, prompts, how)):
                if batch == self.stop:
                    raise KeyboardInterrupt
                self.prompts += len(rows)
                yield rows, written

    monkeypatch.setattr(unmask.lab.tasks.math.solve, "generate", counter := Counted())
    return counter


def test_every_output_is_kept(whole):
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == [f"svamp-{number}" for number in range(10)]
    assert [row["gold"] for row in rows] == [row["answer"][:-2] for row in addition(10, shift=100)]
    assert set(rows[0]) == {
        "id", "row", "prompt", "question", "generated", "tokens", "finish", "gold", "kind", "extracted", "right", "batch",
    }  # fmt: skip


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_outputs(model, problems, whole, tmp_path, counted, batches):
    counted.stop = batches
    with pytest.raises(KeyboardInterrupt):
        run(model, settings(problems), tmp_path)
    counted.prompts, counted.stop = 0, None
    (solved,) = run(model, settings(problems), tmp_path)
    assert (tmp_path / "svamp.jsonl").read_bytes() == whole
    assert counted.prompts == 10 - 3 * batches  # finished batches are not generated again
    assert solved.count == 10
    run(model, settings(problems), tmp_path)
    assert counted.prompts == 10 - 3 * batches  # a run over finished outputs only reads them


def test_a_file_that_is_cut_anywhere_is_repaired(model, problems, whole, tmp_path, counted):
    """A kill during a write leaves batches in the order of generation, and the last of them is cut at some byte."""
    counted.stop = 2
    with pytest.raises(KeyboardInterrupt):
        run(model, settings(problems), tmp_path)
    counted.stop, path = None, tmp_path / "svamp.jsonl"
    written = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(written) if byte == ord("\n")]
    for cut in (1, ends[0] - 1, ends[0], ends[0] + 5, ends[2] - 1, ends[2], ends[3], ends[4] + 40, len(written) - 1):
        path.write_bytes(written[:cut])
        counted.prompts = 0
        run(model, settings(problems), tmp_path)
        assert path.read_bytes() == whole, cut
        assert counted.prompts == (10 if cut < ends[2] else 7), cut


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from unmask.lab.tasks.math.generate import GenerationSettings
from unmask.lab.models import load_base
from unmask.lab.tasks.math.solve import SolveSettings, solve
from unmask.lab.tasks.math import outputs

append, calls = outputs.OutputFile.append, []
def cut_short(self, batch):
    calls.append(batch)
    rows = append(self, batch)
    if len(calls) == 2:  # in the middle of the second batch's write
        data = self.path.read_bytes()
        os.truncate(self.path, len(data) - 30)
        os.kill(os.getpid(), signal.SIGKILL)
    return rows
outputs.OutputFile.append = cut_short

model, tokenizer, _ = load_base(sys.argv[1], None, 0, "generation")
how = GenerationSettings(max_new_tokens=8, batch_size=3)
wanted = SolveSettings(("svamp",), sys.argv[2], generation=how)
list(solve(model.double(), tokenizer, wanted, Path(sys.argv[3]), {"model": "tiny"}))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_in_a_write_leaves_what_another_can_finish(model, problems, whole, tmp_path, counted):
    save_llama(tmp_path / "base")
    words = [sys.executable, "-c", KILLED, tmp_path / "base", problems, tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run(model, settings(problems), tmp_path / "out")
    assert counted.prompts == 7
    assert (tmp_path / "out" / "svamp.jsonl").read_bytes() == whole


def test_a_limit_can_be_raised_later(model, problems, whole, tmp_path, counted):
    (few,) = run(model, settings(problems, limit=4), tmp_path)
    assert (few.count, counted.prompts) == (4, 4)
    (all_,) = run(model, settings(problems), tmp_path)
    assert (all_.count, counted.prompts) == (10, 10)
    (again,) = run(model, settings(problems, limit=4), tmp_path)
    assert (again, counted.prompts) == (few, 10)

    def texts(data):
        return [json.loads(line)["generated"] for line in data.splitlines()]

    assert texts((tmp_path / "svamp.jsonl").read_bytes()) == texts(whole)


def test_scores_count_right_unanswered_and_cut_outputs(problems, tmp_path, monkeypatch):
    from unmask.lab.tasks.math.generate import Generated

    said = ["The answer is 101.", "The answer is 99.", "No idea.", "The answer is 113", "It may be 117 or"]

    def canned(model, tokenizer, prompts, how):
        yield list(range(5)), [Generated(text, 3, "length" if text.endswith("or") else "end") for text in said]

    monkeypatch.setattr(unmask.lab.tasks.math.solve, "generate", canned)
    (solved,) = run(None, settings(problems, limit=5, batch_size=5), tmp_path)  # golds: 101, 105, 109, 113, 117
    assert (solved.right, solved.unanswered, solved.cut) == (3, 1, 1)
    assert solved.metrics() == {"accuracy": 0.6, "unanswered": 0.2, "cut": 0.2}
    assert json.loads((tmp_path / "scores.json").read_text())["svamp"]["accuracy"] == 0.6


def test_answers_are_read_again_from_kept_texts(model, problems, tmp_path, counted):
    run(model, settings(problems), tmp_path)
    path = tmp_path / "svamp.jsonl"
    rows = [
        json.loads(line) | {"generated": "The answer is 5 and 101 pears."} for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (marked,) = run(model, settings(problems), tmp_path)
    (last,) = run(model, settings(problems, rule="last"), tmp_path)
    assert (marked.right, last.right, counted.prompts) == (0, 1, 10)
    assert json.loads(path.read_text().splitlines()[0])["extracted"] == "101"


def test_outputs_of_another_evaluation_are_refused(model, problems, tmp_path):
    run(model, settings(problems, limit=2), tmp_path)
    quiet = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match=r"outputs of another evaluation \(model was 'tiny', and is 'other'\)"):
        list(solve(model, byte_tokenizer(), settings(problems), tmp_path, {"model": "other"}, console=quiet))
    with pytest.raises(ConfigError, match=r"prompt was 'alpaca', and is 'chat'"):
        run(model, settings(problems, prompt="chat"), tmp_path)
    run(model, settings(problems, limit=2, batch_size=1), tmp_path)  # with another batch size it is the same evaluation
    (tmp_path / "metrics.jsonl").write_text("a run's own file\n")
    (solved,) = run(model, settings(problems, limit=1, prompt="chat"), tmp_path, overwrite=True)
    assert solved.count == len((tmp_path / "svamp.jsonl").read_bytes().splitlines()) == 1
    assert (tmp_path / "metrics.jsonl").read_text() == "a run's own file\n"


def test_outputs_for_other_questions_are_refused(model, tmp_path):
    folder = math_folder(tmp_path / "math")
    run(model, settings(folder, limit=2), tmp_path / "out")
    (folder / "SVAMP" / "test.json").write_text(json.dumps(addition(10, shift=101)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"svamp\.jsonl' holds an output for another prompt in row 0"):
        run(model, settings(folder, limit=2), tmp_path / "out")


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    file = OutputFile(path)
    assert file.read() == {}
    file.append([{"row": 0}, {"row": 1}])
    assert file.read() == {0: {"row": 0, "batch": [0, 2]}, 1: {"row": 1, "batch": [0, 2]}}
    path.write_bytes(b'{"row": 0}\n' + path.read_bytes())
    with pytest.raises(DataError, match=r"x\.jsonl, line 1 is not a row of an evaluation"):
        file.read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sets": ("sst2",)}, r"test sets sst2: they must be of gsm8k, svamp"),
        ({"sets": ("math10k",)}, r"test sets math10k: they must be"),
        ({"sets": ()}, r"test sets \(none\)"),
        ({"rule": "first"}, r"rule = 'first'; it must be one of marked, last"),
        ({"limit": 0}, r"limit = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SolveSettings(**{"sets": ("svamp",), **change})


def test_a_missing_set_is_reported_before_anything_is_generated(model, problems, tmp_path, counted):
    with pytest.raises(DataError, match="no AQuA/test"):
        run(model, settings(problems, sets=("svamp", "aqua")), tmp_path / "out")
    assert counted.prompts == 0
    assert not Path(tmp_path / "out").exists()
