"""Checks the transport by files: late, unordered, cut and pruned ones, and a publisher that is killed and started again."""

from __future__ import annotations

import copy
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import nets
import pytest
import torch
from helpers import assert_same_tensors, snapshot
from mutating import Mutator
from sync_runs import Pair

import unmask
from unmask import ConfigError, SyncError, SyncTimeoutError
from unmask.sync import Folder, Publisher, Receiver


def names(path):
    return sorted(p.name for p in path.iterdir())


def kinds(path):
    return [name.rsplit("-", 1)[1].removesuffix(".sync") for name in names(path)]


@pytest.mark.parametrize(
    "method", [unmask.id3(60, steps=5), unmask.repeat_d3(60), unmask.pafi(60)], ids=["id3", "repeat", "pafi"]
)
def test_every_version_arrives(method, tmp_path):
    pair = Pair(method, nets.mixed(torch.bfloat16), transport=Folder(tmp_path))
    for version in range(1, 6):
        assert pair.step().version == version
    assert kinds(tmp_path)[0] == "full"
    assert len(names(tmp_path)) == 5


def test_old_files_are_removed_and_a_late_reader_starts_at_the_newest_full_one(tmp_path):
    pair = Pair(unmask.id3(60, steps=30), transport=Folder(tmp_path, full_every=4))
    for _ in range(14):
        pair.step()
    assert kinds(tmp_path) == ["full", "epoch", "epoch", "epoch", "full", "epoch"]  # versions 9 to 14
    late = Receiver(nets.mixed(), Folder(tmp_path))
    assert [late.receive(timeout=0) for _ in range(2)] == [13, 14]
    assert_same_tensors(snapshot(late._targets._model), snapshot(pair.model))
    with pytest.raises(SyncTimeoutError, match=r"holds no message that follows. Version 14 is held"):
        late.receive(timeout=0)


def test_a_reader_that_was_away_for_long_takes_the_newest_full_one(tmp_path):
    pair = Pair(unmask.id3(60, steps=30), transport=Folder(tmp_path, full_every=3))
    away = Receiver(nets.mixed(), Folder(tmp_path))
    pair.step()
    assert away.receive(timeout=0) == 1
    for _ in range(10):
        pair.step()
    assert [away.receive(timeout=0) for _ in range(2)] == [10, 11]
    assert_same_tensors(snapshot(away._targets._model), snapshot(pair.model))


def test_files_that_come_in_any_order_and_cut_are_waited_for(tmp_path):
    source, copied = tmp_path / "a", tmp_path / "b"
    pair = Pair(unmask.repeat_d3(60), transport=Folder(source))
    states = []
    for _ in range(6):
        pair.step()
        states.append(snapshot(pair.model))
    copied.mkdir()
    rollout = nets.mixed()
    receiver = Receiver(rollout, Folder(copied))
    draw, files = random.Random(1), names(source)
    for name in draw.sample(files, len(files)):
        data = (source / name).read_bytes()
        for cut in (0, 100, 128, len(data) - 1):  # a copy in progress
            (copied / name).write_bytes(data[:cut])
            with pytest.raises(SyncTimeoutError):
                receiver.receive(timeout=0)
        (copied / name).write_bytes(data)
        while True:
            try:
                version = receiver.receive(timeout=0)
            except SyncTimeoutError:
                break
            assert_same_tensors(snapshot(rollout), states[version - 1])
    assert receiver.version == 6


def test_a_cut_file_is_retried_until_it_is_whole(tmp_path):
    pair = Pair(unmask.pafi(60), transport=Folder(tmp_path))
    pair.step()
    pair.train()
    pair.publisher.publish()
    path = tmp_path / names(tmp_path)[-1]
    data = path.read_bytes()
    path.write_bytes(data[:200])

    def mend():
        time.sleep(0.3)
        path.write_bytes(data)

    thread = threading.Thread(target=mend)
    thread.start()
    assert pair.receiver.receive(timeout=20) == 2
    thread.join()
    pair.assert_equal()


def test_a_cut_file_without_its_rest_ends_in_an_error_that_names_it(tmp_path):
    pair = Pair(unmask.pafi(60), transport=Folder(tmp_path))
    pair.train()
    pair.publisher.publish()
    path = tmp_path / names(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SyncTimeoutError, match=rf"{path.name}' cannot be used yet: it has"):
        pair.receiver.receive(timeout=0.1)
    assert_same_tensors(snapshot(pair.rollout), pair.base)


def test_damaged_files_are_never_taken(tmp_path):
    pair = Pair(unmask.id3(60, steps=5), transport=Folder(tmp_path))
    pair.step()
    pair.train()
    pair.publisher.publish()
    path = tmp_path / names(tmp_path)[-1]
    data, before = path.read_bytes(), snapshot(pair.rollout)
    for seed in range(400):
        damaged = Mutator(seed).damaged(data)
        path.write_bytes(damaged)
        if damaged != data:
            with pytest.raises(SyncTimeoutError):
                pair.receiver.receive(timeout=0)
    assert_same_tensors(snapshot(pair.rollout), before)
    path.write_bytes(data)
    assert pair.receiver.receive(timeout=0) == 2
    pair.assert_equal()


def test_a_full_message_that_is_damaged_for_good_is_passed_over_for_the_one_before(tmp_path):
    pair = Pair(unmask.id3(60, steps=30), transport=Folder(tmp_path, full_every=4))
    for _ in range(9):
        pair.step()
    path = tmp_path / names(tmp_path)[-1]
    assert kinds(tmp_path)[-1] == "full"
    path.write_bytes(path.read_bytes()[:300])
    late = Receiver(nets.mixed(), Folder(tmp_path))
    assert [late.receive(timeout=0) for _ in range(4)] == [5, 6, 7, 8]


def test_a_renamed_file_is_refused(tmp_path):
    pair = Pair(unmask.pafi(60), transport=Folder(tmp_path))
    pair.step()
    pair.train()
    pair.publisher.publish()
    old = names(tmp_path)[-1]
    (tmp_path / old).rename(tmp_path / old.replace("000000000002", "000000000003"))
    shutil.copy(tmp_path / names(tmp_path)[0], tmp_path / old)
    with pytest.raises(SyncTimeoutError, match="its name is that of another message"):
        pair.receiver.receive(timeout=0)


@pytest.mark.parametrize("ahead", [False, True], ids=["later clock", "earlier clock"])
def test_a_publisher_that_is_started_again(ahead, tmp_path, monkeypatch):
    pair = Pair(unmask.id3(60, steps=5), transport=Folder(tmp_path))
    for _ in range(3):
        pair.step()
    if ahead:  # the new trainer's clock is behind
        monkeypatch.setattr(time, "time_ns", lambda: 5)
    again = nets.mixed()
    publisher = Publisher(unmask.select(again, unmask.pafi(40)), Folder(tmp_path))
    with pytest.raises(SyncTimeoutError):
        pair.receiver.receive(timeout=0)
    publisher.publish()
    assert kinds(tmp_path) == ["full"]
    assert pair.receiver.receive(timeout=0) == 1
    assert_same_tensors(snapshot(pair.rollout), snapshot(again))


def test_a_publisher_of_before_does_not_remove_the_files_of_a_later_one(tmp_path):
    pair = Pair(unmask.pafi(60), transport=Folder(tmp_path, full_every=1))
    pair.step()
    again = nets.mixed()
    Publisher(unmask.select(again, unmask.pafi(40)), Folder(tmp_path)).publish()
    later = names(tmp_path)
    pair.train()
    pair.publisher.publish()
    assert later == [name for name in names(tmp_path) if name in later]
    assert pair.receiver.receive(timeout=0) == 1
    assert_same_tensors(snapshot(pair.rollout), snapshot(again))


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    pair = Pair(unmask.pafi(60), transport=Folder(tmp_path))
    before = os.umask(0o027)
    try:
        pair.step()
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o640


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".x.part").write_bytes(b"")
    pair = Pair(unmask.pafi(60), transport=Folder(tmp_path, full_every=1))
    for _ in range(5):
        pair.step()
    assert {"notes.txt", ".x.part"} < set(names(tmp_path))
    assert len(names(tmp_path)) == 4


def test_folders_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    selection = unmask.select(nets.mixed(), unmask.pafi(6))
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        Publisher(selection, Folder(tmp_path / "file"))
    with pytest.raises(SyncError, match="full_every = 0"):
        Folder(tmp_path, full_every=0)
    receiver = Receiver(nets.mixed(), Folder(tmp_path / "not there yet"))
    with pytest.raises(SyncTimeoutError, match="no message came within"):
        receiver.receive(timeout=0.05)


READER = """
import sys
sys.path[:0] = [{support!r}]
import nets, torch, unmask
model = nets.mixed()
receiver = unmask.sync.Receiver(model, unmask.sync.Folder({folder!r}))
while receiver.version < 4:
    receiver.receive(timeout=60)
torch.save(model.state_dict(), {out!r})
"""


def test_another_process_follows(tmp_path):
    folder, out = tmp_path / "messages", tmp_path / "model.pt"
    support = os.path.dirname(nets.__file__)
    code = READER.format(support=support, folder=str(folder), out=str(out))
    reader = subprocess.Popen([sys.executable, "-W", "error", "-c", code], stderr=subprocess.PIPE, text=True)
    pair = Pair(unmask.id3(60, steps=4), transport=Folder(folder))
    for _ in range(4):
        pair.step()
    _, said = reader.communicate(timeout=120)
    assert reader.returncode == 0, said
    assert_same_tensors(torch.load(out), snapshot(pair.model))


def test_a_copy_of_the_transport_serves_another_receiver(tmp_path):
    pair = Pair(unmask.pafi(60), transport=Folder(tmp_path))
    pair.step()
    other = copy.deepcopy(pair.tape)
    assert Receiver(nets.mixed(), other).receive(timeout=0) == 1
