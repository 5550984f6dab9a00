"""Tests `unmask delta`: one run gives a series of models, and each is bit for bit the model of the run at that step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Done, run, train_words
from helpers import assert_same_tensors
from tiny import tiny_world
from torch import Tensor
from transformers import AutoModelForSequenceClassification, TrainerCallback

import unmask
from unmask import SparseDelta
from unmask.delta.fingerprint import digest, fingerprint
from unmask.errors import ConfigError
from unmask.integrations.trainer import SelectiveTrainer
from unmask.lab.inside import _has_adapters
from unmask.lab.models import load_tuned
from unmask.lab.study.train_cell import train_cell
from unmask.lab.training import training
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.run_folder import RunFolder
from unmask.lab.training.series import deltas, write_series
from unmask.lab.training.settings import read_yaml

# These tests are not about the Trainer's and peft's own warnings.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

DATA = ("--data", "dev.csv", "--text", "review", "--label", "verdict")
KEPT = ("--set", "eval_steps=8", "--set", "keep_checkpoints=none")
STEPS = (8, 16, 24)
KINDS: dict[str, tuple[object, ...]] = {
    "plain": (),
    "without_dense": ("--set", "dense=none", "--set", "order=true"),
    "repeat": ("--method", "repeat_d3", "--set", "stride=3"),
    "kept": ("--method", "repeat_d3", "--set", "stride=3", "--set", "leaving=kept"),
    "fish": ("--method", "fish", "--set", "num_samples=16"),
    "lora": ("--into", "lora", "--lora-r", 4),
    "pruned": ("--into", "lora", "--method", "sparse_adapter", "--set", "criterion=random"),
    "whole_lora": ("--into", "lora", "--method", "full"),
    "full": ("--method", "full"),
    "pfeiffer": ("--into", "pfeiffer", "--set", "reduction_factor=4"),
}
NEED_ADAPTERS = pytest.mark.skipif(not _has_adapters(), reason="adapters is not installed")
KIND_PARAMS = [pytest.param(kind, marks=NEED_ADAPTERS if kind == "pfeiffer" else ()) for kind in KINDS]


class Capture(TrainerCallback):
    """Asks the live selection for its delta at each checkpoint."""

    def __init__(self, trainer: SelectiveTrainer, order: bool, into: dict[int, SparseDelta]) -> None:
        self.trainer, self.order, self.into = trainer, order, into

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.into[state.global_step] = self.trainer.selection.delta("base", order=self.order)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="module")
def captured(world: Path) -> dict[str, dict[int, SparseDelta]]:
    """Returns the deltas that the selection of each kind of run gave at `STEPS`; `trained` fills the mapping."""
    return {}


@pytest.fixture
def trained(world: Path, captured: dict[str, dict[int, SparseDelta]], request: pytest.FixtureRequest) -> str:
    """Trains a run of the kind that the test asks for, once; its folder has the kind's name."""
    kind = getattr(request, "param", "plain")
    if kind not in captured:
        found: dict[int, SparseDelta] = {}

        class Captured(SelectiveTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.add_callback(Capture(self, "order=true" in KINDS[kind], found))

        words = list(train_words(kind, *KEPT, *KINDS[kind]))
        if "full" in words:
            del words[words.index("--budget") : words.index("--budget") + 2]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "SelectiveTrainer", Captured)
            run(*words, cwd=world)
        captured[kind] = found
    return str(kind)


@pytest.fixture
def copied(world: Path, trained: str, tmp_path: Path) -> Iterator[Path]:
    """Copies the run, for a test that breaks something in it."""
    folder = world / "copied"
    shutil.copytree(world / trained, folder)
    shutil.rmtree(folder / "series", ignore_errors=True)
    yield folder
    shutil.rmtree(folder)


def parts(delta: SparseDelta) -> dict[str, Tensor]:
    """Returns the tensors of a delta, by name."""
    found = {f"{name} whole": tensor for name, tensor in delta.whole.items()}
    for name, entry in delta.sparse.items():
        slots = {} if entry.slots is None else {f"{name} slots": entry.slots}
        found |= {f"{name} indices": entry.indices, f"{name} values": entry.values, **slots}
    return found


def assert_same_delta(left: SparseDelta, right: SparseDelta) -> None:
    assert_same_tensors(parts(left), parts(right))
    assert left.base == right.base


def written(world: Path, kind: str, step: int) -> SparseDelta:
    file = world / kind / "series" / f"step-{step}.safetensors"
    if not file.is_file():
        run("delta", f"{kind}/checkpoints/checkpoint-{step}", cwd=world)
    return SparseDelta.load(file)


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "eval_loss" in row}


# The delta of a checkpoint.


@pytest.mark.parametrize("trained", KIND_PARAMS, indirect=True)
def test_a_checkpoints_delta_is_that_of_the_selection_at_that_step(
    world: Path, trained: str, captured: dict[str, dict[int, SparseDelta]]
) -> None:
    own = SparseDelta.load(world / trained / "delta.safetensors")
    assert tuple(captured[trained]) == STEPS
    digests = {fingerprint({n: digest(t) for n, t in parts(d).items()}) for d in captured[trained].values()}
    assert len(digests) == len(STEPS), "the models differ"
    for step, expected in captured[trained].items():
        delta = written(world, trained, step)
        assert_same_delta(delta, expected)
        assert dict(delta.metadata) == {
            **expected.metadata,
            **{key: own.metadata[key] for key in ("task", "into") if key in own.metadata},
            "checkpoint": f"checkpoint-{step}",
            "after": delta.metadata["after"],
        }
    assert_same_delta(written(world, trained, STEPS[-1]), own)


@pytest.mark.parametrize("trained", ["plain", "lora"], indirect=True)
def test_the_smaller_models_lie_inside_the_larger_ones(world: Path, trained: str) -> None:
    series = [written(world, trained, step) for step in STEPS]
    assert [len(delta) for delta in series] == [delta.metadata["used"] for delta in series] == [40, 80, 120]
    assert {delta.metadata["budget"] for delta in series} == {120}
    for small, large in pairwise(series):
        for name, entry in small.sparse.items():
            assert torch.isin(entry.indices, large.sparse[name].indices).all()


@pytest.mark.parametrize(
    "trained", [p for p in KIND_PARAMS if p.values[0] in ("plain", "lora", "pfeiffer")], indirect=True
)
def test_eval_prints_the_metrics_that_the_run_logged_at_that_step(world: Path, trained: str) -> None:
    logged = evaluations(world / trained)
    found = []
    for step in STEPS:
        delta = written(world, trained, step)
        assert delta.metadata["after"] == {key: logged[step][f"eval_{key}"] for key in ("loss", "accuracy", "f1")}
        printed = run("eval", "base", f"{trained}/series/step-{step}.safetensors", *DATA, cwd=world).stdout
        found.append(f"accuracy {logged[step]['eval_accuracy']:.4f}, f1 {logged[step]['eval_f1']:.4f}")
        assert found[-1] in printed
    assert len(set(found)) > 1, "the models differ"


def test_apply_writes_an_ordinary_checkpoint_in_which_no_more_than_the_smaller_budget_changed(
    world: Path, trained: str
) -> None:
    delta = written(world, trained, 8)
    run("apply", "base", f"{trained}/series/step-8.safetensors", "--output", "merged", cwd=world)
    merged = AutoModelForSequenceClassification.from_pretrained(world / "merged").state_dict()
    base = AutoModelForSequenceClassification.from_pretrained(world / "base").state_dict()
    changed = {n: int((merged[n] != base[n]).sum()) for n in base if not n.startswith("classifier")}
    assert 0 < sum(changed.values()) <= delta.metadata["used"] == 40
    tuned = load_tuned(str(world / "base"), delta)[0]
    assert_same_tensors(merged, {name: tensor.detach() for name, tensor in tuned.state_dict().items()})


# The command.


def test_the_list_has_steps_weights_and_the_logged_figures(world: Path, trained: str) -> None:
    logged = evaluations(world / trained)
    for path in (trained, f"{trained}/checkpoints/checkpoint-16"):
        _, *rows = run("delta", path, "--list", cwd=world).stdout.splitlines()
        assert [row.split(maxsplit=2) for row in rows] == [
            [
                str(step),
                str(used),
                ", ".join(f"{key} {logged[step][f'eval_{key}']:.4f}" for key in ("loss", "accuracy", "f1")),
            ]
            for step, used in zip(STEPS, (40, 80, 120), strict=True)
        ]


def test_a_run_stands_for_its_last_checkpoint_and_a_step_for_its_own(
    world: Path, trained: str, captured: dict[str, dict[int, SparseDelta]], tmp_path: Path
) -> None:
    run("delta", trained, "--output", tmp_path / "last.safetensors", cwd=world)
    run("delta", trained, "--step", 16, "--output", tmp_path / "made" / "sixteen.safetensors", cwd=world)
    assert_same_delta(SparseDelta.load(tmp_path / "last.safetensors"), captured[trained][24])
    assert_same_delta(SparseDelta.load(tmp_path / "made" / "sixteen.safetensors"), captured[trained][16])


@pytest.mark.parametrize("trained", ["plain", "fish", "full"], indirect=True)
def test_a_note_says_which_checkpoints_are_no_series_of_budgets(world: Path, trained: str) -> None:
    printed = run("delta", trained, "--step", 8, cwd=world).stdout
    assert (f"{trained} does not unmask its budget step by step" in printed) == (trained != "plain")
    assert ("note:" in printed) == (trained != "plain")


def test_a_run_that_was_stopped_gives_its_models_too(
    world: Path, copied: Path, captured: dict[str, dict[int, SparseDelta]]
) -> None:
    """The folder is as a kill at step 17 leaves it."""
    for name in ("delta.safetensors", "summary.json"):
        (copied / name).unlink()
    shutil.rmtree(copied / "checkpoints" / "checkpoint-24")
    rows = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if json.loads(row)["step"] <= 16]
    (copied / "metrics.jsonl").write_text("".join(kept) + '{"step": 1')
    done = run("delta", "copied", cwd=world)
    assert done.stdout.startswith("step 16: 80 weights unmasked by then (budget 120)\nevaluated at that step: loss ")
    assert_same_delta(SparseDelta.load(copied / "series" / "step-16.safetensors"), captured["plain"][16])


def test_a_base_that_has_moved_can_be_given(
    world: Path, trained: str, captured: dict[str, dict[int, SparseDelta]], tmp_path: Path
) -> None:
    shutil.copytree(world / "base", tmp_path / "moved")
    run("delta", trained, "--step", 8, "--base", tmp_path / "moved", "--output", tmp_path / "d.safetensors", cwd=world)
    delta = SparseDelta.load(tmp_path / "d.safetensors")
    assert_same_delta(delta, captured[trained][8])
    assert delta.metadata["base_id"] == str(tmp_path / "moved")


# Refusals.


def assert_refused(world: Path, *words: object) -> str:
    """Checks that `unmask delta` refuses its arguments, and returns what it says."""
    done: Done = run("delta", *words, cwd=world, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("nowhere",), "'nowhere' is neither the output folder of a run"),
        (("base",), "there is no 'base/config.yaml'. Give RUN"),
        (("base/checkpoint-8",), "'base/checkpoint-8' is neither"),
        (("plain", "--step", 9), "holds no whole checkpoint of step 9; there are checkpoints of step 8, 16, 24"),
        (("plain/checkpoints/checkpoint-9",), "no whole checkpoint of step 9"),
        (("plain/checkpoints/checkpoint-8", "--step", 16), "is the checkpoint of step 8, and --step 16"),
        (("plain", "--list", "--step", 8, "--base", "base"), "goes without --step and --base"),
        (("plain", "--output", "plain/delta.safetensors"), "'plain/delta.safetensors' exists already"),
        (("plain", "--base", "./gone"), "cannot be set up again: there is no model folder './gone'"),
    ],
)  # fmt: skip
def test_paths_and_steps_that_do_not_exist_are_refused(
    world: Path, trained: str, words: tuple[object, ...], match: str
) -> None:
    assert match in assert_refused(world, *words)


def test_an_incomplete_checkpoint_is_refused_and_listed_as_such(world: Path, copied: Path) -> None:
    (copied / "checkpoints" / "checkpoint-16" / "trainer_state.json").write_text('{"global_st')
    state = copied / "checkpoints" / "checkpoint-8" / "selection.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    message = assert_refused(world, "copied", "--step", 16)
    assert (
        "'copied/checkpoints/checkpoint-16' is not whole: its file trainer_state.json has 11 bytes instead of"
        in message
    )
    message = assert_refused(world, "copied/checkpoints/checkpoint-8")
    assert "'copied/checkpoints/checkpoint-8' is not whole: its file selection.safetensors has" in message
    assert "there are checkpoints of step 24" in message
    rows = run("delta", "copied", "--list", cwd=world).stdout.splitlines()[1:]
    assert [row.split()[:3] for row in rows[:2]] == [["8", "-", "incomplete"], ["16", "-", "incomplete"]]
    assert rows[2].split()[:2] == ["24", "120"]
    assert not (copied / "series").exists()


def test_a_run_without_checkpoints_is_refused(world: Path, copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    for words in (("copied",), ("copied", "--list")):
        assert "'copied/checkpoints' holds no whole checkpoint. A run keeps all its" in assert_refused(world, *words)


def altered_base(world: Path, folder: Path, everywhere: bool) -> Path:
    """Writes another base, in which every weight is another, or a single one that the run does not select."""
    shutil.copytree(world / "base", folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    selected = {n: e.indices for n, e in SparseDelta.load(world / "plain" / "delta.safetensors").sparse.items()}
    name, flat = next(
        (n, i)
        for n, p in model.named_parameters()
        if not n.startswith("classifier")
        for i in range(p.numel())
        if i not in selected.get(n, torch.empty(0))
    )
    with torch.no_grad():
        for parameter in model.parameters() if everywhere else [dict(model.named_parameters())[name].view(-1)[flat]]:
            parameter.add_(0.5)
    model.base_model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("everywhere", [True, False])
def test_another_base_is_refused(world: Path, copied: Path, tmp_path: Path, everywhere: bool) -> None:
    other = altered_base(world, tmp_path / "other", everywhere)
    message = assert_refused(world, "copied", "--step", 8, "--base", other)
    message_part = (
        "does not fit the selection that 'copied/config.yaml' makes now"
        if everywhere
        else "is not the base that the run"
    )
    assert message_part in message
    assert "Give the run's base with --base" in message
    assert not (copied / "series").exists()


@pytest.mark.parametrize("trained", ["without_dense"], indirect=True)
def test_another_random_init_than_the_runs_is_refused(world: Path, copied: Path) -> None:
    own = SparseDelta.load(copied / "delta.safetensors")
    name = own.overlaid[0]
    SparseDelta(own.sparse, {**own.whole, name: own.whole[name] + 1}, own.base, own.metadata).save(
        copied / "delta.safetensors"
    )
    assert "the random init of what the base lacks is another here" in assert_refused(world, "copied", "--step", 8)


def test_from_another_folder_the_message_says_where_to_go(world: Path, trained: str, tmp_path: Path) -> None:
    done = run("delta", world / trained, "--base", world / "base", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "train.csv" in done.stderr
    assert "counts from the folder where the run was started" in done.stderr


# The checkpoints and deltas that a run keeps.


def test_a_run_keeps_two_checkpoints_as_many_as_it_is_told_or_all(world: Path) -> None:
    for words, kept in ((), (8, 12)), (("--set", "keep_checkpoints=1"), (12,)), (KEPT[2:], (4, 8, 12)):
        run(*train_words("some", "--overwrite", "--set", "save_steps=4", "--set", "max_steps=12"), *words, cwd=world)
        assert tuple(RunFolder(world / "some").steps()) == kept
    given = {"model": "m", "output": "o", "task": "rte", "budget": "1%"}
    with pytest.raises(ConfigError, match="keep_checkpoints = 0"):
        TrainConfig(**given, keep_checkpoints=0)  # type: ignore[arg-type]


def test_overwriting_leaves_no_series_of_the_earlier_run(world: Path, copied: Path) -> None:
    run("delta", "copied", cwd=world)
    assert list((copied / "series").iterdir())
    run("train", "--config", "copied/config.yaml", "--set", "output=copied", "--overwrite", "--max-steps", 2, cwd=world)
    assert not (copied / "series").exists()


@pytest.fixture
def at_home(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def cell_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in read_yaml(folder / "config.yaml").items() if key != "output"} | changes


def test_a_sweeps_run_keeps_its_series(
    at_home: Path, trained: str, captured: dict[str, dict[int, SparseDelta]], tmp_path: Path
) -> None:
    settings, cell = cell_settings(at_home / trained), tmp_path / "cell"
    made = train_cell(settings, cell)
    assert not (cell / "checkpoints").exists()
    logged = evaluations(at_home / trained)
    assert json.loads(json.dumps(made["series"])) == [
        {"step": step, "used": used, "score": logged[step]["eval_accuracy"], "file": f"series/step-{step}.safetensors"}
        for step, used in zip(STEPS, (40, 80, 120), strict=True)
    ]
    for entry in made["series"]:
        assert_same_delta(SparseDelta.load(cell / entry["file"]), captured[trained][entry["step"]])
    assert train_cell(settings, cell)["series"] == made["series"], "the result was lost after the checkpoints"
    assert "series" not in train_cell(settings | {"keep_checkpoints": 2, "max_steps": 8}, tmp_path / "two")
    assert not (tmp_path / "two" / "series").exists()


def test_a_sweeps_full_fine_tuning_keeps_no_series(at_home: Path, trained: str, tmp_path: Path) -> None:
    made = train_cell(cell_settings(at_home / trained, method="full", budget=None, max_steps=8), tmp_path / "cell")
    assert "series" not in made
    assert sorted(path.name for path in (tmp_path / "cell").iterdir() if path.is_dir()) == []


def test_write_series_completes_a_series_that_was_cut_off(
    copied: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    folder = RunFolder(copied)
    for step, delta in deltas(folder, [16]):
        delta.save(folder.series_file(step))
    before = folder.series_file(16).stat().st_mtime_ns
    assert [(step, used) for step, used, _ in write_series(folder)] == [(8, 40), (16, 80), (24, 120)]
    assert folder.series_file(16).stat().st_mtime_ns == before
    assert not unmask.delta.live.has_selection(load_tuned("base", SparseDelta.load(folder.series_file(8)))[0])
