"""Tests that a stopped run loses at most the steps since its last whole checkpoint, and ends with the same delta."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kill_points import FullDisk, Recorder, content, hearing, restore
from trainers import Tokens, arguments, bert, selective
from transformers import Trainer
from whole_runs import go, go_on, newest_step, recorded, result, small_world

import unmask
from unmask import ConfigError, SelectionError, UnmaskError, WriteError
from unmask.files import append_json, discard, replacing, sweep_up, write_text
from unmask.integrations import checkpoints
from unmask.integrations.checkpoints import MANIFEST, differences, examine, newest
from unmask.integrations.trainer_checkpoints import WholeCheckpoints
from unmask.lab.training import locking
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.run_folder import RunFolder
from unmask.lab.training.training import train

# These tests are not about the Trainer's own warnings.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(config: TrainConfig) -> Recorder:
    """Makes the uninterrupted run, and records every state of its folder on the way."""
    return recorded(config)


@pytest.fixture(scope="module")
def series(config: TrainConfig) -> Path:
    """Returns the folder of the same run with all its checkpoints, before it wrote its result."""
    folder = Path(config.output).with_name("series")
    go(replace(config, keep_checkpoints=None), folder)
    for name in ("delta.safetensors", "summary.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def other(config: TrainConfig) -> Path:
    """Returns the folder of a run of another seed, with its checkpoints of steps 2, 4 and 6."""
    folder = Path(config.output).with_name("other")
    go(replace(config, keep_checkpoints=None, seed=1), folder)
    return folder


@pytest.fixture
def copied(series: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(series, tmp_path / "copied"))


# Kills.


def sealed_by(state: dict) -> int:
    """Returns the step of the last checkpoint that has its manifest; -1 for none."""
    return max((int(name.split("/")[1].split("-")[1]) for name in state if name.endswith(f"/{MANIFEST}")), default=-1)


def test_at_every_kill_point_the_last_sealed_checkpoint_or_a_later_one_is_taken(
    whole: Recorder, tmp_path: Path
) -> None:
    states = whole.left_by_kills()
    assert len(states) > 100
    seen = set()
    for i, state in enumerate(states):
        restore(state, tmp_path / str(i))
        step = newest_step(tmp_path / str(i))
        assert step >= sealed_by(state)
        seen.add(step)
        shutil.rmtree(tmp_path / str(i))
    assert seen == {-1, 2, 4, 6, 99}


@pytest.mark.parametrize("part", range(8))
def test_a_run_that_was_killed_goes_on_to_the_same_result(
    whole: Recorder, config: TrainConfig, part: int, tmp_path: Path
) -> None:
    """Tries one kill point in each eighth of the run; `make soak` tries all of them."""
    states = whole.left_by_kills()
    state = states[part * len(states) // 8 + 5]
    go_on(config, state, tmp_path / "killed")
    assert result(tmp_path / "killed") == result(whole.folder)
    assert not list(tmp_path.glob("killed/**/.*"))


def test_overwriting_that_was_killed_never_resumes_the_old_run(
    config: TrainConfig, other: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(other, tmp_path / "run"))
    old, new = replace(config, seed=1, keep_checkpoints=None), replace(config, output=str(folder))
    before = content(folder)
    refused = 0
    for i, state in enumerate(recorded(new, overwrite=True).left_by_kills()):
        restore(state, tmp_path / str(i))
        left = RunFolder(tmp_path / str(i))
        for settings in (old, new):
            try:
                start = left.check(settings, resume=True, overwrite=False)
            except ConfigError:
                refused += 1
                continue
            if settings is old:  # no file was changed yet
                assert before.items() <= state.items()
            else:
                assert (
                    start.summary
                    or start.checkpoint.settings is None
                    or start.checkpoint.settings["config"]["seed"] == 0
                )
        shutil.rmtree(tmp_path / str(i))
    assert refused > 60
    assert result(folder) == result(Path(config.output))


def test_after_a_killed_overwrite_the_error_says_what_to_do(config: TrainConfig, copied: Path) -> None:
    write_text(copied / ".overwriting", "")
    with pytest.raises(ConfigError, match=r"an earlier --overwrite .* Start again with --overwrite"):
        go(config, copied, resume=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        go(config, copied)


# A full disk.


@pytest.mark.parametrize("operation", [2, 9, 17, 30])
def test_a_full_disk_is_an_error_of_unmask_and_costs_no_checkpoint(
    whole: Recorder, config: TrainConfig, operation: int, tmp_path: Path
) -> None:
    disk, folder = FullDisk(operation), tmp_path / "full"
    with hearing(folder, disk), pytest.raises(UnmaskError, match=r"No space left|unexpected pos"):
        go(config, folder)
    assert disk.refused
    saved = content(folder) if folder.exists() else {}
    shutil.rmtree(folder, ignore_errors=True)
    go_on(config, saved, folder)
    assert result(folder) == result(whole.folder)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    trainer, _ = selective(tmp_path, save_strategy="steps", save_steps=3, save_total_limit=1)
    save, calls = torch.save, []

    def full(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) > 6:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        save(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(WriteError, match=r"checkpoint-6' cannot be written .* make room, and resume"):
            trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert examine(tmp_path / "checkpoint-3").whole


# Damaged, missing and mixed files.

DAMAGES: dict[str, Callable[[Path, Path, Path], object]] = {
    "removed": lambda file, older, foreign: file.unlink(),
    "emptied": lambda file, older, foreign: file.write_bytes(b""),
    "cut": lambda file, older, foreign: file.write_bytes(file.read_bytes()[:-7]),
    "altered": lambda file, older, foreign: file.write_bytes(flipped(file.read_bytes())),
    "older": lambda file, older, foreign: shutil.copy(older, file),
    "foreign": lambda file, older, foreign: shutil.copy(foreign, file),
}
FILES = (
    "selection.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
)


def flipped(data: bytes) -> bytes:
    """Flips one bit in each of some evenly spaced bytes. They are several, because some bytes are padding."""
    every = max(1, len(data) // 16)
    return bytes(byte ^ 8 if i % every == every // 2 else byte for i, byte in enumerate(data))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_checkpoint_is_passed_over_and_its_file_is_named(
    name: str, damage: str, copied: Path, other: Path
) -> None:
    folder = copied / "checkpoints" / "checkpoint-6"
    before = (folder / name).read_bytes()
    DAMAGES[damage](
        folder / name, folder.with_name("checkpoint-4") / name, other / "checkpoints" / "checkpoint-6" / name
    )
    if (folder / name).exists() and (folder / name).read_bytes() == before:
        assert (name, damage) in {
            ("scheduler.pt", "foreign"),
            ("training_args.bin", "older"),
        }  # these files are the same there
        return
    found, passed = newest(folder.parent)
    if (name, damage) == (MANIFEST, "removed"):
        assert "has no manifest.json; its parts load and all belong to step 6" in found.note
        return
    assert found.step == 4
    named = "its file" if name == MANIFEST and damage in ("older", "foreign") else name
    assert named in passed[0].fault


KNOWN_WITHOUT = [
    (name, damage)
    for name in FILES[:4]
    for damage in ("removed", "emptied", "cut", "altered", "older")
    # The state of an RNG does not name a step. The checksum in a selection's own file finds alterations.
    if (name, damage) not in {("rng_state.pth", "older"), ("selection.safetensors", "altered")}
]


@pytest.mark.parametrize(("name", "damage"), KNOWN_WITHOUT)
def test_without_a_manifest_all_parts_must_load_and_be_of_one_step(name: str, damage: str, copied: Path) -> None:
    """The checkpoint is as unmask 0.1 wrote it. Nothing shows that the RNG's state, for example, is another run's."""
    folder = copied / "checkpoints" / "checkpoint-6"
    (folder / MANIFEST).unlink()
    assert examine(folder).whole
    DAMAGES[damage](folder / name, folder.with_name("checkpoint-4") / name, folder)
    assert name in examine(folder).fault


def test_a_file_that_a_trainer_would_read_and_the_manifest_lacks_is_refused(copied: Path) -> None:
    folder = copied / "checkpoints" / "checkpoint-6"
    (folder / "notes.txt").write_text("a user's own")
    assert examine(folder).whole
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_1.pth")
    assert "rng_state_1.pth was not written with it" in examine(folder).fault


def test_a_checkpoint_under_another_name_is_not_of_that_step(copied: Path) -> None:
    (copied / "checkpoints" / "checkpoint-4").rename(copied / "checkpoints" / "checkpoint-8")
    found, passed = newest(copied / "checkpoints")
    assert found.step == 6
    assert passed[0].fault == "its files belong to step 4"


def test_a_checkpoint_that_is_passed_over_is_reported_and_the_result_is_the_same(
    config: TrainConfig, whole: Recorder, copied: Path, capsys: pytest.CaptureFixture
) -> None:
    (copied / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()
    train(replace(config, output=str(copied)), resume=True)
    printed = "".join(capsys.readouterr().out.split())  # the console wraps lines
    assert "checkpoint-6'ispassedover:itsfileoptimizer.ptismissing" in printed
    assert f"continuingfrom{copied}/checkpoints/checkpoint-4" in printed
    assert result(copied) == result(whole.folder)


def test_a_run_without_a_whole_checkpoint_is_refused_with_every_reason(config: TrainConfig, copied: Path) -> None:
    for step in (2, 4, 6):
        (copied / "checkpoints" / f"checkpoint-{step}" / "scheduler.pt").unlink()
    with pytest.raises(
        ConfigError, match=r"checkpoint-6'.* scheduler.pt .*checkpoint-2'.*Start again with --overwrite"
    ):
        go(config, copied, resume=True)


def test_a_whole_checkpoint_of_another_run_is_refused(config: TrainConfig, copied: Path, other: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    shutil.copytree(other / "checkpoints", copied / "checkpoints")
    with pytest.raises(ConfigError, match=r"\n  seed: 1 -> 0\n"):
        go(config, copied, resume=True)


# Going on with other settings, and after the end.


def test_every_setting_that_differs_is_named(config: TrainConfig, copied: Path) -> None:
    changed = replace(config, max_steps=12, lr=0.01, dense=("classifier",), logging_steps=3)
    with pytest.raises(ConfigError) as caught:
        go(changed, copied, resume=True)
    message = str(caught.value)
    for line in ("max_steps: 6 -> 12", "lr: 0.05 -> 0.01", "dense: ['new'] -> ['classifier']"):
        assert f"\n  {line}\n" in message
    assert "logging_steps" not in message  # the delta does not depend on it
    assert f"unmask train --config {copied}/config.yaml --resume" in message
    assert "its learning rate falls and its budget is unmasked over all the steps" in message


def test_other_data_under_the_same_name_are_refused(config: TrainConfig, copied: Path) -> None:
    data = Path(config.data)
    before = data.read_text()
    data.write_text(before.replace("plot", "scene"))
    try:
        with pytest.raises(ConfigError, match="the training data are not those"):
            go(config, copied, resume=True)
    finally:
        data.write_text(before)


def test_a_finished_run_is_left_as_it_is(
    config: TrainConfig, whole: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(shutil.copytree(whole.folder, tmp_path / "done"))
    before = content(folder)
    outcome = train(replace(config, output=str(folder)), resume=True)
    assert "isfinished:6steps,nothingislefttodo" in "".join(capsys.readouterr().out.split())
    assert content(folder) == before
    assert outcome.summary["steps"] == 6
    with pytest.raises(ConfigError, match="max_steps: 6 -> 9"):
        go(replace(config, max_steps=9), folder, resume=True)


def test_a_run_at_its_last_step_takes_no_further_step(config: TrainConfig, tmp_path: Path) -> None:
    """The six steps end within an epoch, where a Trainer that resumes would take one more."""
    repeated = replace(config, method="repeat_d3")
    go(repeated, tmp_path / "run")
    before = result(tmp_path / "run")
    for name in ("delta.safetensors", "summary.json"):
        (tmp_path / "run" / name).unlink()
    go(repeated, tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == before


# A Trainer of the user.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """Makes a run of ten steps with a Trainer, which keeps one checkpoint."""
    folder = tmp_path_factory.mktemp("trainer") / "run"
    recorder = Recorder(folder)
    trainer, _ = selective(folder, lambda steps: unmask.repeat_d3(40), save_strategy="steps", save_steps=3,
                           save_total_limit=1)  # fmt: skip
    with hearing(folder, recorder):
        trainer.train()
    return folder, recorder


def test_a_trainers_folder_holds_a_whole_checkpoint_at_every_moment_after_the_first(
    trained: tuple[Path, Recorder], tmp_path: Path
) -> None:
    steps = []
    for i, state in enumerate(trained[1].left_by_kills()):
        restore(state, tmp_path / str(i))
        found, _ = newest(tmp_path / str(i))
        steps.append(-1 if found is None else found.step)
        shutil.rmtree(tmp_path / str(i))
    assert steps == sorted(steps)
    assert set(steps) == {-1, 3, 6, 9, 10}
    assert [path.name for path in trained[0].iterdir()] == ["checkpoint-10"]


def test_a_trainer_at_its_last_step_takes_no_further_step(trained: tuple[Path, Recorder], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "run"))
    (folder / "checkpoint-12").mkdir()
    again, callback = selective(folder, lambda steps: unmask.repeat_d3(40), max_steps=10)
    with pytest.warns(UserWarning, match="checkpoint-12' is passed over"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == callback.live.step == 10


def test_a_trainers_damaged_checkpoint_is_refused(trained: tuple[Path, Recorder], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "run"))
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"")
    trainer, _ = selective(folder, lambda steps: unmask.repeat_d3(40))
    with pytest.raises(
        SelectionError, match=r"checkpoint-10' cannot be resumed from: its file optimizer.pt has 0 bytes"
    ):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    with pytest.raises(SelectionError, match=r"no whole checkpoint .*optimizer.pt"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_error_about_another_number_of_epochs_says_what_differs(epochs: int, tmp_path: Path) -> None:
    selective(tmp_path, save_strategy="epoch")[0].train()
    with pytest.raises(SelectionError) as caught:
        selective(tmp_path, num_train_epochs=epochs)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert f"method.steps: 10 -> {5 * epochs}. It was planned for 10 steps, and this run for {5 * epochs}." in str(
        caught.value
    )
    assert "spreads its budget over the steps planned" in str(caught.value)


def test_fewer_steps_than_the_checkpoint_has_are_refused(trained: tuple[Path, Recorder]) -> None:
    trainer, _ = selective(trained[0], lambda steps: unmask.repeat_d3(40), max_steps=8)
    with pytest.raises(SelectionError, match="was saved at step 10, and the run has 8 steps"):
        trainer.train(resume_from_checkpoint=str(trained[0] / "checkpoint-10"))


def test_a_trainer_with_a_peft_adapter_has_whole_checkpoints_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import unmask.peft

    def built(folder: Path) -> Trainer:
        given = unmask.peft.SelectiveConfig(task_type="SEQ_CLS", budget=60, target_modules="all-linear")
        training = arguments(folder, save_strategy="steps", save_steps=3, save_total_limit=1, max_steps=6)
        trainer = Trainer(peft.get_peft_model(bert(), given), training, train_dataset=Tokens())
        trainer.add_callback(WholeCheckpoints(trainer))
        return trainer

    straight, recorder = built(tmp_path / "run"), Recorder(tmp_path / "run")
    with hearing(recorder.folder, recorder):
        straight.train()
    steps = []
    for i, state in enumerate(recorder.left_by_kills()):
        restore(state, tmp_path / str(i))
        found, _ = newest(tmp_path / str(i))
        if found is not None and found.step == 3:
            half = tmp_path / str(i)  # the last such state is in the middle of writing checkpoint-6
        steps.append(-1 if found is None else found.step)
    assert steps == sorted(steps)
    assert set(steps) == {-1, 3, 6}
    resumed = built(half)
    with pytest.warns(UserWarning, match="checkpoint-6' is passed over"):
        resumed.train(resume_from_checkpoint=True)
    saved = [folder / "checkpoint-6" / "adapter_model.safetensors" for folder in (half, tmp_path / "run")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    saved[0].write_bytes(flipped(saved[0].read_bytes()))
    with pytest.raises(SelectionError, match=r"its file adapter_model\.safetensors is damaged"):
        built(half).train(resume_from_checkpoint=str(half / "checkpoint-6"))


def test_the_saved_arguments_are_the_users(trained: tuple[Path, Recorder]) -> None:
    saved = torch.load(trained[0] / "checkpoint-10" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1


def test_rotation_removes_checkpoints_of_later_steps_first(tmp_path: Path) -> None:
    for step in (2, 4, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.rotate(tmp_path, tmp_path / "checkpoint-6", 3, best=str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    checkpoints.rotate(tmp_path, tmp_path / "checkpoint-6", 1, best=str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]


# Locks and files.

HOLD = """
import sys, time
from pathlib import Path
from unmask.lab.training import locking
with locking.holding(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(config: TrainConfig, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    with pytest.raises(ConfigError, match=f"is in use: process {process.pid} on "):
        go(config, tmp_path)
    process.kill()
    process.communicate()
    with folder.held(), pytest.raises(ConfigError, match="is in use: this process"), RunFolder(tmp_path).held():
        pass
    with folder.held():
        pass
    assert not list(tmp_path.iterdir())


FORK = """
import os, sys
from pathlib import Path
from unmask.lab.training import locking
with locking.holding(Path(sys.argv[1])) as mine:
    child = os.fork()
    if child == 0:  # it stands for a DataLoader's worker, which outlives its parent
        sys.stdin.read()
        os._exit(0)
    print(mine, flush=True)
    os._exit(0)
"""


def test_a_forked_child_does_not_keep_the_lock_of_a_dead_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        assert process.wait() == 0
        with locking.holding(tmp_path / ".lock") as mine:  # the child lives until its input is closed
            assert mine


def test_an_output_that_is_no_folder_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ConfigError, match=r"(?i)give a folder"):
            go(config, output)


def test_a_refused_run_leaves_no_folder(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UnmaskError):
        go(replace(config, budget="99999999"), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_any_new_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "text", "a")
        with unmask.files.replacing(tmp_path / "again") as part:
            part.write_text("b")
        model = torch.nn.Linear(2, 2)
        unmask.select(model, unmask.pafi(2)).delta().save(tmp_path / "delta.safetensors")
        checkpoints.seal(tmp_path, 0, {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("text", "again", "delta.safetensors", MANIFEST), 0o666 & ~mask)


def test_files_that_kills_left_are_removed(tmp_path: Path) -> None:
    def stopped() -> None:
        with replacing(tmp_path / "a") as part:
            part.write_text("half")
            shutil.copy(part, tmp_path / ".b1.part")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "inside").write_text("")
    (tmp_path / "c").rename(tmp_path / ".c1.removed")
    discard(tmp_path / "missing")
    sweep_up(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_line_is_appended_after_one_that_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    for row in ({"a": 1}, {"a": 2}):
        append_json(file, row)
    file.write_bytes(file.read_bytes()[:-4])
    append_json(file, {"a": 3})
    assert file.read_text() == '{"a": 1}\n{"a":\n{"a": 3}\n'


def test_differences_do_not_depend_on_the_order_of_keys() -> None:
    old = {"b": {"x": 1, "y": [1, 2]}, "a": None, "same": 0}
    new = {"same": 0, "a": 3, "b": {"y": (1, 2), "x": 2}, "more": True}
    assert differences(old, new) == ["b.x: 1 -> 2", "a: none -> 3", "more: none -> True"]
