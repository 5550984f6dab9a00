"""Checks that a receiver refuses what is damaged, missing, repeated or of another base, and changes nothing then."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections import Counter

import nets
import pytest
import torch
from helpers import assert_same_tensors, mlp, snapshot
from mutating import Mutator, dumps
from sync_runs import Pair, PlainReader, Tape, as_bits, signed
from torch import nn

import unmask
from unmask import SyncError, SyncTimeoutError, UnmaskError
from unmask.sync import Publisher, Receiver, writing


def refused(pair: Pair, data: bytes, match: str) -> None:
    """Asserts that a message is refused and changes nothing."""
    before, held = snapshot(pair.rollout), (pair.receiver.version, pair.receiver.epoch)
    pair.tape.deliver(data)
    with pytest.raises(SyncError, match=match):
        pair.receiver.receive(timeout=0)
    assert_same_tensors(snapshot(pair.rollout), before)
    assert (pair.receiver.version, pair.receiver.epoch) == held


def taped(method: unmask.Method, steps: int = 4) -> tuple[Pair, list[bytes]]:
    """Returns a pair whose receiver holds the base, and the messages of some steps."""
    pair = Pair(method)
    pair.tape.passing = False
    for _ in range(steps):
        pair.step()
    return pair, pair.tape.messages


def take(pair: Pair, *messages: bytes) -> None:
    for data in messages:
        pair.tape.deliver(data)
        pair.receiver.receive(timeout=0)


def test_a_gap_is_refused_until_a_full_message_comes():
    pair, (first, _, third, fourth) = taped(unmask.id3(60, steps=9))
    take(pair, first)
    refused(pair, third, "version 3 came, and version 1 is held: 1 are missing")
    refused(pair, fourth, "2 are missing")
    pair.tape.passing = True
    assert pair.tape.wanted()  # the receiver has asked
    assert pair.step().kind == "full"
    assert not pair.tape.wanted()
    assert pair.step().kind == "epoch"


def test_a_repeated_or_late_message_is_passed_over():
    pair, messages = taped(unmask.repeat_d3(60, stride=2))
    take(pair, *messages[:3])
    held = snapshot(pair.rollout)
    for late in messages[:3]:
        pair.tape.deliver(late)
    with pytest.raises(SyncTimeoutError, match="version 3 is held"):
        pair.receiver.receive(timeout=0)
    assert_same_tensors(snapshot(pair.rollout), held)
    pair.tape.deliver(messages[2])
    take(pair, messages[3])
    assert pair.receiver.version == 4
    pair.assert_equal()


def test_messages_before_the_first_full_one_are_refused():
    pair, (_, second, third, _) = taped(unmask.id3(60, steps=2))
    refused(pair, second, "of which no FULL message has come")
    refused(pair, third, "joined late")
    assert_same_tensors(snapshot(pair.rollout), pair.base)


@pytest.mark.parametrize("method", [unmask.id3(60, steps=4), unmask.repeat_d3(60), unmask.pafi(60)], ids=str)
def test_every_order_ends_at_the_newest_version_or_is_refused(method):
    _, messages = taped(method, 5)
    draw = random.Random(0)
    for _ in range(10):
        pair = Pair(method)
        reached = 0
        for number in draw.sample(range(5), 5):
            pair.tape.deliver(messages[number])
            try:
                assert pair.receiver.receive(timeout=0) == number + 1 == reached + 1 or number == 0
                reached = number + 1
            except SyncError:
                assert number + 1 != reached + 1
            assert pair.receiver.version == reached
        take(pair, *messages[reached:])
        reader = PlainReader({name: bits for name, bits in as_bits(pair.base).items() if name != "out.weight"})
        for data in messages:
            reader.read(data)
        held = as_bits(snapshot(pair.rollout))
        assert all((reader.tensors[name] == held[name]).all() for name in reader.tensors)


@pytest.mark.parametrize("first", [unmask.id3(60, steps=3), unmask.repeat_d3(60, stride=2)], ids=str)
@pytest.mark.parametrize("dense", [None, "norm"])
def test_a_publisher_that_is_started_again_is_followed_from_the_base(first, dense):
    pair = Pair(first, dense=dense)
    for _ in range(4):
        pair.step()
    again = nets.mixed()
    assert_same_tensors(snapshot(again), pair.base)
    selection = unmask.select(again, unmask.pafi(40), dense="scale|up.bias")
    publisher = Publisher(selection, pair.tape)
    old = pair.tape.messages[-1]
    for step in range(3):
        optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
        nets.loss(again, nets.tokens(step)).backward()
        optimizer.step()
        publisher.publish()
        assert pair.receiver.receive(timeout=0) == step + 1
        assert_same_tensors(snapshot(pair.rollout), snapshot(again))
    refused(pair, old, "no FULL message has come|started before")
    pair.publisher.resync()
    with pytest.raises(SyncError, match="had started before"):
        pair.receiver.receive(timeout=0)
    assert_same_tensors(snapshot(pair.rollout), snapshot(again))


def test_a_tensor_that_was_sent_in_part_and_then_whole_goes_back_to_its_base():
    pair = Pair(unmask.bitfit(), include="up|norm")
    pair.step()
    pair.step()
    for method, dense in ((unmask.pafi(9), "up|norm"), (unmask.pafi(40), None)):
        model = nets.mixed()
        selection = unmask.select(model, method, dense=dense)
        optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
        nets.loss(model, nets.tokens(0)).backward()
        optimizer.step()
        Publisher(selection, pair.tape).publish()
        pair.receiver.receive(timeout=0)
        assert_same_tensors(snapshot(pair.rollout), snapshot(model))


def test_a_publisher_that_is_started_again_on_another_base_is_refused():
    pair = Pair(unmask.pafi(60))
    pair.step()
    held = snapshot(pair.rollout)
    publisher = Publisher(unmask.select(nets.mixed(seed=1), unmask.pafi(60)), pair.tape)
    publisher.publish()
    with pytest.raises(SyncError, match="not the publisher's base"):
        pair.receiver.receive(timeout=0)
    assert_same_tensors(snapshot(pair.rollout), held)
    pair.step()  # a FULL one, which the receiver has asked for


@pytest.mark.parametrize("method", [unmask.pafi(60), unmask.id3(60, steps=3)], ids=str)
def test_another_base_is_refused_wherever_the_places_are(method):
    pair, messages = taped(method)
    places = pair.selection.indices
    name = max(places, key=lambda name: places[name].numel())
    with torch.no_grad():
        flat = pair.rollout.get_parameter(name).view(-1)
        flat[places[name][-1]] = torch.nextafter(flat[places[name][-1]], torch.tensor(9.0))
    changed = snapshot(pair.rollout)
    told = 0
    for data in messages:
        pair.tape.deliver(data)
        try:
            pair.receiver.receive(timeout=0)
        except SyncError as error:
            told += "not the publisher's base" in str(error)
    assert told == 1
    flat = pair.rollout.get_parameter(name).detach().view(-1)
    assert flat[places[name][-1]] == changed[name].view(-1)[places[name][-1]]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nets.mixed(torch.bfloat16), "is torch.bfloat16 in the receiver's model and float32"),
        (mlp(), "no tensor '.*', which the publisher trains"),
        (nn.Sequential(nets.mixed()), "no tensor '.*', which the publisher trains"),
    ],
)
def test_another_model_is_refused(model, match):
    pair = Pair(unmask.pafi(60), rollout=model)
    pair.tape.passing = False
    pair.step()
    refused(pair, pair.tape.messages[0], match)


def test_another_shape_is_refused():
    rollout = nets.mixed()
    rollout.up = nn.Linear(12, 30)
    pair = Pair(unmask.pafi(60), rollout=rollout)
    pair.tape.passing = False
    pair.step()
    refused(pair, pair.tape.messages[0], r"has shape \(30.*\) in the receiver's model")


@pytest.mark.parametrize("nth", [0, 1, 5])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["full", "epoch", "step"])
@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), KeyboardInterrupt()], ids=type)
def test_a_write_that_fails_is_undone(nth, which, error, monkeypatch):
    pair = Pair(unmask.id3(60, steps=2), dense="norm")
    pair.tape.passing = False
    for _ in range(3):
        pair.step()
    messages = pair.tape.messages
    take(pair, *messages[:which])
    before = snapshot(pair.rollout)
    calls, store = 0, writing.store

    def failing(*args):
        nonlocal calls
        calls += 1
        store(*args)
        if calls == nth + 1:
            raise error

    monkeypatch.setattr(writing, "store", failing)
    pair.tape.deliver(messages[which])
    with pytest.raises((SyncError, KeyboardInterrupt)) as caught:
        pair.receiver.receive(timeout=0)
    monkeypatch.undo()
    assert isinstance(caught.value, KeyboardInterrupt) or "as it was before" in str(caught.value)
    assert_same_tensors(snapshot(pair.rollout), before)
    assert pair.receiver.version == which
    take(pair, *messages[which:])
    pair.assert_equal()


def test_tensors_that_cannot_be_written_are_refused_before_any_write():
    rollout = nets.mixed()
    pair = Pair(unmask.full(), rollout=rollout)
    pair.tape.passing = False
    rollout.scale.data = torch.ones(1).expand(12)
    pair.step()
    refused(pair, pair.tape.messages[0], "'scale' cannot be written: it has several entries in one place")


# Damage.


@pytest.mark.parametrize("which", [0, 1, 3], ids=["full", "epoch", "step"])
def test_a_damaged_message_is_refused(which):
    pair, messages = taped(unmask.id3(60, steps=3))
    take(pair, *messages[:which])
    before, data = snapshot(pair.rollout), messages[which]
    for seed in range(700):
        damaged = Mutator(seed).damaged(data)
        if damaged != data:
            pair.tape.deliver(damaged)
            with pytest.raises(SyncError):
                pair.receiver.receive(timeout=0)
    assert_same_tensors(snapshot(pair.rollout), before)
    take(pair, *messages[which:])
    pair.assert_equal()


@pytest.mark.parametrize("which", [0, 1, 3], ids=["full", "epoch", "step"])
def test_every_cut_of_a_message_is_refused(which):
    pair, messages = taped(unmask.id3(60, steps=3))
    take(pair, *messages[:which])
    before = snapshot(pair.rollout)
    for length in range(0, len(messages[which]), 7):
        pair.tape.deliver(messages[which][:length])
        with pytest.raises(SyncError, match="bytes"):
            pair.receiver.receive(timeout=0)
    assert_same_tensors(snapshot(pair.rollout), before)


@pytest.mark.parametrize("which", [0, 1, 3], ids=["full", "epoch", "step"])
def test_a_message_that_is_changed_and_signed_again_is_refused_or_taken_as_it_stands(which):
    """Changes header, JSON or numbers. What is taken must be what the plain reader takes, on the same base."""
    _, messages = taped(unmask.repeat_d3(60, stride=1))
    counts: Counter[str] = Counter()
    for seed in range(160):
        mutator = Mutator(seed)
        data = forged(messages[which], mutator)
        rollout, tape = nets.mixed(), Tape()
        receiver, base = Receiver(rollout, tape), as_bits(dict(rollout.named_parameters()))
        for each in messages[:which]:
            tape.deliver(each)
            receiver.receive(timeout=0)
        before = snapshot(rollout)
        tape.deliver(data)
        try:
            receiver.receive(timeout=0)
        except UnmaskError:
            assert_same_tensors(snapshot(rollout), before)
            counts["refused"] += 1
            continue
        reader = PlainReader(base)
        for each in (*messages[:which], data):
            reader.read(each)
        held = as_bits(dict(rollout.named_parameters()))
        assert all((reader.tensors[name] == held[name]).all() for name in reader.tensors)
        counts["taken"] += 1
    assert counts["refused"] > 40
    assert counts["taken"] > 8


@pytest.mark.parametrize("which", [0, 1, 3], ids=["full", "epoch", "step"])
def test_the_hash_of_the_base_values_is_checked(which):
    pair, messages = taped(unmask.id3(60, steps=3))
    take(pair, *messages[:which])
    data = bytearray(messages[which])
    data[64] ^= 1
    refused(pair, signed(bytes(data)), "base values in it are not those|other places than the receiver holds")


def forged(message: bytes, mutator: Mutator) -> bytes:
    """Returns a message with a changed header field, JSON or byte, of a right length and checksum."""
    draw = mutator.draw
    fields = list(struct.unpack("<8sHBBIQQQQ16s32s32s", message[:128]))
    payload = message[128:]
    which = draw.randrange(3)
    if which == 0:
        at = draw.randrange(1, 11)
        fields[at] = draw.choice((0, 1, 2, 3, 255)) if at < 9 else draw.randbytes(len(fields[at]))
    elif which == 1 and fields[4]:
        meta = dumps(mutator.changed(json.loads(payload[: fields[4]]))).encode("utf-8", "surrogatepass")
        meta += b" " * (-len(meta) % 8)
        payload = meta + payload[fields[4] :]
        fields[4], fields[8] = len(meta), len(payload)
    else:
        at = draw.randrange(fields[4], len(payload))
        payload = payload[:at] + bytes([draw.randrange(256)]) + payload[at + 1 :]
    return signed(struct.pack("<8sHBBIQQQQ16s32s32s", *fields) + payload)


# Misuse.


def test_a_receiver_on_the_model_in_training_is_refused():
    model, tape = nets.mixed(), Tape()
    selection = unmask.select(model, unmask.pafi(6))
    with pytest.raises(SyncError, match="live selection"):
        Receiver(model, tape)
    selection.release()
    with pytest.raises(SyncError, match="was released"):
        Publisher(selection, tape).publish()


def test_diverged_weights_are_not_sent():
    pair = Pair(unmask.pafi(60), dense="norm")
    pair.step()
    with pair.selection.writing(), torch.no_grad():
        pair.selection.values[3] = torch.nan
    with pytest.raises(SyncError, match="is NaN or infinite"):
        pair.publisher.publish()
    with pair.selection.writing(), torch.no_grad():
        pair.selection.values[3] = 1.0
        pair.selection.dense[0].parameter[0] = torch.inf
    with pytest.raises(SyncError, match=r"'norm.bias' is NaN or infinite"):
        pair.publisher.publish()
    assert len(pair.tape.messages) == pair.publisher.version == 1


def test_a_message_that_could_not_be_sent_is_made_up_for_by_the_next():
    class Failing(Tape):
        fails = False

        def send(self, header, message):
            if self.fails:
                raise unmask.WriteError("the disk is full")
            super().send(header, message)

    tape = Failing()
    pair = Pair(unmask.id3(60, steps=6), transport=tape)
    pair.step()
    tape.fails = True
    pair.train()
    with pytest.raises(unmask.WriteError):
        pair.publisher.publish()
    tape.fails = False
    assert (pair.step().version, pair.publisher.epoch) == (2, 2)


def test_two_receivers_of_which_one_joins_late():
    pair = Pair(unmask.id3(60, steps=6))
    pair.step()
    pair.step()
    rollout = nets.mixed()
    late = Receiver(rollout, pair.tape)
    assert pair.step().kind == "full"
    assert late.receive(timeout=0) == pair.receiver.version == 3
    assert pair.step().kind == "epoch"
    late.receive(timeout=0)
    assert_same_tensors(snapshot(rollout), snapshot(pair.model))


def test_a_loaded_state_is_sent():
    pair = Pair(unmask.id3(60, steps=6))
    pair.step()
    state = copy.deepcopy(pair.selection.state_dict())
    held = snapshot(pair.model)
    for _ in range(3):
        pair.step()
    pair.selection.load_state_dict(state)
    assert pair.publisher.publish().kind == "epoch"
    pair.receiver.receive(timeout=0)
    pair.assert_equal()
    assert_same_tensors(snapshot(pair.rollout), held)


def test_nothing_comes_in_time():
    pair = Pair(unmask.pafi(6))
    with pytest.raises(SyncTimeoutError, match=r"within 0.01 s; version 0 is held"):
        pair.receiver.receive(timeout=0.01)
    with pytest.raises(TimeoutError):
        pair.receiver.receive(timeout=0)
