"""Checks that hostile values, absurd numbers, full disks, unusable places and Ctrl-C end with an error of unmask."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import peft_nets
import pytest
import torch
import yaml
from commands import run, train_words
from helpers import mlp, trained
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from tiny import tiny_world
from torch import nn
from transformers import AutoTokenizer

import peft
import unmask
import unmask.peft
from unmask import SparseDelta, SparseTensor, UnmaskError
from unmask.analysis import changed
from unmask.errors import ConfigError, DataError, DeltaError, MethodError, WriteError
from unmask.lab.study.parsing import parse
from unmask.lab.tasks.math.outputs import OutputFile
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.settings import build, read_yaml
from unmask.methods.schedules import MOST_WALKED, Schedule, uniform
from unmask.peft.card import complete_card, section, write_card
from unmask.reading import MOST_VALUES, Malformed, parse_json
from unmask.selection.state import write_state

RUN = {"model": "m", "output": "o", "task": "sst2", "budget": "1%"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("world"))


# Plain values.


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 200 + "]" * 200, "1" * 10_000, "1" * 30, '"\\ud800"', "{", "\ufeff{}", b"\xff"],
    ids=range(8),
)
def test_hostile_json_is_refused(text):
    with pytest.raises(Malformed):
        parse_json(text)


def test_many_small_values_are_refused_before_they_take_memory():
    text = b"[" + b"[]," * 8_000_000 + b"0]"
    tracemalloc.start()
    with pytest.raises(Malformed, match="values"):
        parse_json(text)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert len(parse_json(b"[" + b"0," * 1000 + b"0]")) == 1001 < MOST_VALUES


def test_a_large_header_of_a_delta_is_refused_before_it_takes_memory(tmp_path):
    """Checks a header with 28 MB of empty lists, which once took 814 MB of memory."""
    path = tmp_path / "large.safetensors"
    save_file({"w::whole": torch.zeros(1)}, path, metadata={"unmask": "[" + "[]," * 9_300_000 + "0]"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DeltaError, match=r"header has about .* values"):
        SparseDelta.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # in KB
    path.write_bytes((2**26).to_bytes(8, "little") + bytes(2**26))
    with pytest.raises(DeltaError, match="header has 67,108,864 bytes"):
        SparseDelta.load(path)


HOSTILE_YAML = {
    "deep": "a: " + "[" * 3000,
    "deep in blocks": "".join(" " * n + "- \n" for n in range(400)),
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "merged laughs": "a: &a {k: 1}\n"
    + "".join(f"{c}: &{c} {{<<: [{', '.join([f'*{b}'] * 9)}]}}\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself": "a: &a [*a]",
    "merges itself": "a: &a {<<: *a}",
    "an impossible date": "a: 2020-99-99",
    "no bool": "a: !!bool foo",
    "no int": "a: !!int ''",
    "a long int": "a: " + "1" * 5000,
    "a key that is a number": "1: 2",
    "a list": "- 1",
    "nothing": "",
    "a python object": "a: !!python/object:os.system {}",
    "large": "a: " + "x" * 2**21,
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_is_refused_soon(name, tmp_path):
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE_YAML[name])
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"hostile\.yaml"):
        read_yaml(path)
    assert time.process_time() - start < 5


def test_yaml_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("title: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml.*UTF-8"):
        read_yaml(path)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, -(2**40), 1.5, True, [], {}, "1e999", "x"])
@pytest.mark.parametrize("key", ["max_steps", "batch_size", "lora_r"])
def test_a_value_that_is_no_count_is_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        build(RUN | {key: value})
    with pytest.raises(ConfigError, match=key):
        TrainConfig(**RUN | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", float("inf")),
        ("epochs", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
        ("dense", 5),
        ("task", []),
        ("model", {}),
    ],
)
def test_a_setting_of_another_type_or_range_is_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        build(RUN | {key: value})


def test_settings_with_odd_keys_are_refused():
    with pytest.raises(ConfigError, match="unknown setting"):
        build({**RUN, 1: 2, None: 3, "x": 4})  # type: ignore[dict-item]


# Methods and schedules.


@pytest.mark.parametrize("steps", [2**62, 10**12 + 1, 10**400])
def test_an_absurd_number_of_steps_is_refused_at_once(steps):
    with pytest.raises(MethodError, match=r"steps = .*at most"):
        unmask.id3(100, steps=steps)
    with pytest.raises(MethodError, match="at most"):
        Schedule(uniform, steps)
    with pytest.raises(MethodError, match="at most"):
        peft_nets.config(total_steps=steps) if steps < 2**63 else unmask.id3(100, steps=10, stride=steps)


@pytest.mark.parametrize("name", ["uniform", "front-loaded", "at-once"])
def test_a_schedule_that_cannot_go_down_is_not_walked(name):
    start = time.process_time()
    plan = Schedule.of(name, 10**12)
    plan.check(1000)
    assert time.process_time() - start < 0.1
    assert plan.cumulative(10**12 - 1, 1000) == 1000


def test_any_other_schedule_is_walked_as_far_as_that_is_soon():
    with pytest.raises(MethodError, match="selecting steps at most"):
        Schedule.of(lambda t, T, B: B, MOST_WALKED + 1).check(10)
    with pytest.raises(MethodError, match="goes down"):
        Schedule.of(lambda t, T, B: 5 - (t == 70_000), 100_000).check(10)
    Schedule.of("cosine", MOST_WALKED * 10, stride=1000).check(10)
    with pytest.raises(MethodError, match="not callable"):
        Schedule(5, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: unmask.id3(10, 5, eps="x"),
        lambda: unmask.id3(10, 5, exp=None),
        lambda: unmask.id3([], 5),
        lambda: unmask.id3(10, 5, schedule=[]),
        lambda: unmask.heuristic("random", seed="x"),
        lambda: unmask.select(mlp(), "id3"),
        lambda: unmask.select("model", unmask.pafi(10)),
        lambda: unmask.select(mlp(), unmask.pafi(10), include=5),
        lambda: unmask.select(mlp(), unmask.pafi(10), exclude=["0", None]),
        lambda: SparseDelta({"w": SparseTensor([0], [1.0], (2,))}, {}, "sha256:0"),
        lambda: SparseDelta({"w": SparseTensor(torch.tensor([0]), torch.ones(1), (-2,))}, {}, "sha256:0"),
        lambda: SparseDelta({"w": SparseTensor(torch.tensor([0]), torch.ones(1), (2**62, 4))}, {}, "sha256:0"),
        lambda: SparseDelta({"w": SparseTensor(torch.tensor([0]), torch.ones(1).int(), (2,))}, {}, "sha256:0"),
        lambda: parse({"methods": {"a": None}, "rules": 5}),
        lambda: parse({"methods": {"a": None}, "axes": {"seed": [0]}, "choose": {"seeds": 5}}),
        lambda: parse({"methods": {"a": None}, "protocol": {"level": "x"}}),
        lambda: parse({"methods": {"a": None}, "axes": {c: list(range(100)) for c in ("seed", "lr", "eps")}}),
        lambda: parse({"methods": {"a": None}, "claims": {"rows": [{"scores": {}, "average": "1"}]}}),
    ],
)
def test_a_value_of_the_python_interface_is_refused_in_our_words(make):
    with pytest.raises(UnmaskError):
        make()


def test_metadata_that_cannot_be_read_back_are_refused_when_saved(saved, tmp_path):
    delta = SparseDelta.load(saved[1])
    for metadata in ({"x": torch.ones(1)}, {"step": -1}, {"method": 5}, {"x": float("nan"), "used": "many"}):
        with pytest.raises(DeltaError, match="metadata"):
            delta.with_metadata(**metadata).save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_damaged_index_of_a_checkpoint_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(DeltaError, match=r"index\.json.*mapping"):
        changed(tmp_path, {"w": torch.zeros(1)})


def test_a_row_of_outputs_without_a_batch_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"row": 1, "batch": [1, 2, 3]}\n')
    with pytest.raises(DataError, match="line 1"):
        OutputFile(tmp_path / "x.jsonl").read()


# The selection's state.


def test_a_state_that_fails_half_way_changes_nothing(tmp_path):
    """Checks a state whose last part to be loaded is wrong: once all the rest was loaded by then."""
    model, other = nn.Sequential(mlp(), nn.BatchNorm1d(6)), nn.Sequential(mlp(), nn.BatchNorm1d(6))
    other.load_state_dict(model.state_dict())
    selection, mine = (unmask.select(m, unmask.id3(10, steps=3), dense="1") for m in (model, other))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    state, before = selection.state_dict(), mine.state_dict()
    state["dense"] = {**state["dense"], "1.weight": torch.full((6,), float("nan"))}
    with pytest.raises(unmask.SelectionError, match=r"dense\.1\.weight holds NaN"):
        mine.load_state_dict(state)
    assert all(torch.equal(before[key], mine.state_dict()[key]) for key in ("values", "positions", "base"))
    assert mine.used == mine.step == 0


# Adapters and their cards.


def test_names_in_a_model_card_are_shown_and_are_no_markup(tmp_path):
    evil = "a`b|c <script>x</script> [l](u)\n---\n<!-- unmask: end -->"
    record = {
        "method": {"name": "id3|x", "parameters": {"eps": "<b>"}, "steps": 1},
        **dict.fromkeys(("budget", "used", "step", "whole", "parameters"), 1),
        "base_id": evil,
        "fingerprint": "sha256:0",
        "dense": [evil, "head.weight"],
    }
    text = section(record)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(row.count("|") == 3 for row in rows[1:])
    assert "<script>" not in text
    assert "[l]" not in text
    assert "<!--" not in text
    assert "`head.weight`" in text
    write_card(str(tmp_path), record)
    again = write_card(str(tmp_path), record).read_text()
    assert again.count("## Selective fine-tuning") == 1
    with pytest.raises(DataError, match="record"):
        section({**record, "used": "many"})


def test_a_cards_front_matter_holds_any_base_id(tmp_path):
    evil = "a: b\n---\n# c"
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\ntext\n")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": evil, "record": None}))
    complete_card(str(tmp_path))
    assert ModelCard.load(tmp_path / "README.md").data.base_model == evil
    (tmp_path / "adapter_config.json").write_text("[" * 10_000)
    with pytest.raises(DataError, match="adapter_config"):
        complete_card(str(tmp_path))


@pytest.mark.parametrize(
    "value", [{"eps": "x"}, {"stride": 1.5}, {"target_modules": "("}, {"total_steps": True}, {"seed": []}]
)
def test_a_value_of_an_adapters_configuration_is_refused(value):
    with pytest.raises(MethodError, match=next(iter(value))):
        peft_nets.config(**value)


def test_an_adapter_of_another_shape_changes_nothing():
    _, model = peft_nets.wrapped()
    entries = peft.get_peft_model_state_dict(peft_nets.run(model))
    _, fresh = peft_nets.wrapped()
    key = next(key for key in entries if key.endswith("unmask_order"))
    entries[key] = torch.zeros(3)
    with pytest.raises(DeltaError, match="order of unmasking"):
        peft.set_peft_model_state_dict(fresh, entries)
    assert fresh.base_model.deltas.adapters["default"].used == 0


# A tokenizer with more tokens than the embedding.


def test_tokens_beyond_the_embedding_are_refused_before_training(tmp_path):
    root = tiny_world(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.add_tokens(["new1"])
    tokenizer.save_pretrained(root / "base")
    refused = run(*train_words("run"), cwd=root, check=False)
    assert refused.returncode == 1
    assert "'new1'" in refused.stderr
    assert "resize_token_embeddings" in refused.stderr
    assert not (root / "run").exists()


# Places and disks.


@pytest.mark.parametrize("output", ["file", "file/run"])
def test_an_output_that_is_a_file_is_refused_before_work_starts(output, world):
    (world / "file").write_text("mine")
    refused = run(*train_words(output), cwd=world, check=False)
    assert refused.returncode == 1
    assert "'file' is a file" in refused.stderr.replace(f"{world}/", "")
    assert refused.stdout == ""
    assert (world / "file").read_text() == "mine"


SWEEP = "{name: s, settings: {model: absent, data: none.csv, max_steps: 2, budget: 10}, methods: {id3: {}}}"
WRITERS = {
    "demo": ("demo", "--output"),
    "train": ("train", "--model", "absent", "--data", "none.csv", "--budget", 10, "--output"),
    "eval": ("eval", "absent", "none.safetensors", "--task", "gsm8k", "--output"),
    "inspect": ("inspect", "none.safetensors", "--plot"),
    "diff": ("diff", "absent", "absent", "--output"),
    "apply": ("apply", "absent", "none.safetensors", "--output"),
    "delta": ("delta", "absent", "--output"),
    "bench": ("bench", "--model", "no/model", "--output"),
    "bench a curve": ("bench", "--curve", "size", "--output"),
    "sweep": ("sweep", "sweep.yaml", "--output"),
    "reproduce": ("reproduce", "table1", "--model", "absent", "--output"),
    "report": ("report", "absent", "--output"),
}
FILES = ("inspect", "diff", "delta", "report")  # they write a file, the others a folder


def test_the_table_of_writers_has_every_command_with_an_output():
    """Checks all commands but `methods`, which only prints."""
    from unmask.cli.app import app

    names = {each.name or each.callback.__name__ for each in app.registered_commands}
    assert names - {"methods"} == {words[0] for words in WRITERS.values()}


@pytest.mark.parametrize("place", ["is", "below", "far below", "read only"])
@pytest.mark.parametrize("command", WRITERS)
def test_every_command_refuses_its_output_before_any_work(command, place, tmp_path, monkeypatch):
    """Gives neither a model nor data: a command that begins its work would name these first."""

    def begun(*args: object, **kwargs: object) -> None:
        raise AssertionError("work has begun")

    for work in ("cli.demo.fetch_demo_model", "cli.demo.fetch_demo_texts", "lab.bench.curves.run_curve"):
        monkeypatch.setattr(f"unmask.{work}", begun)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "closed")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir()
    (tmp_path / "there.svg").mkdir()
    itself = "there.svg" if command in FILES else "file"
    output, why = {
        "is": (itself, "is a folder" if command in FILES else "is a file"),
        "below": ("file/out", "is a file"),
        "far below": ("file/a/b/out", "is a file"),
        "read only": ("closed/out", "cannot be written to"),
    }[place]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    *words, flag = WRITERS[command]
    refused = run(*words, flag, output, cwd=tmp_path, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"unmask: {flag} = '{output}")
    assert why in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@contextlib.contextmanager
def small_files(size):
    """Keeps the files of this process below ``size`` bytes, as a full disk does; only the number of the error differs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_named_and_the_old_files_are_kept(tmp_path):
    _, _, selection = trained(dense="head")
    path = selection.delta().save(tmp_path / "delta.safetensors")
    state = write_state(selection.state_dict(), tmp_path / "state.safetensors")
    held = path.read_bytes(), state.read_bytes()
    with small_files(1000):
        with pytest.raises(WriteError, match=r"delta\.safetensors' cannot be written .*kept"):
            selection.delta().save(path)
        with pytest.raises(WriteError, match=r"state\.safetensors' cannot be written"):
            write_state(selection.state_dict(), state)
    assert (path.read_bytes(), state.read_bytes()) == held
    assert sorted(os.listdir(tmp_path)) == ["delta.safetensors", "state.safetensors"]


@pytest.mark.filterwarnings("default")
def test_a_disk_that_fills_in_training_ends_it_with_one_line(world):
    with small_files(6_000):  # the metrics fit, the optimizer's state does not
        refused = run(*train_words("full", "--set", "max_steps=4"), cwd=world, check=False)
    assert refused.returncode == 1
    assert "cannot be written" in refused.stderr
    assert "resume from them" in refused.stderr


# The command line.


def test_python_m_unmask_prints_one_line(tmp_path):
    words = [sys.executable, "-m", "unmask", "train", "--config", str(tmp_path / "absent")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith("unmask: there is no configuration file")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "place", ["unmask.lab.training.training.set_up", "unmask.lab.training.training._Run._report_start"]
)
def test_ctrl_c_before_the_first_step_is_one_line_too(place, world, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    stopped = run(*train_words(f"stopped-{place[-5:]}"), cwd=world, check=False)
    assert stopped.returncode == 130
    assert stopped.stderr.startswith("unmask: interrupted")
    assert len(stopped.stderr.splitlines()) == 1


def test_ctrl_c_in_any_other_command_is_one_line(saved, monkeypatch):
    monkeypatch.setattr("unmask.cli.inspect.run_inspect", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = run("inspect", saved[1], cwd=Path(saved[1]).parent, check=False)
    assert (stopped.returncode, len(stopped.stderr.splitlines())) == (130, 1)


def test_settings_written_are_read_back(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**RUN, "dense": ["a", "b"], "lr": 1e-4}))
    assert build(read_yaml(path)) == TrainConfig(**RUN, dense=("a", "b"), lr=1e-4)
